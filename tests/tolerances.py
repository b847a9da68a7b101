"""Every tolerance of the tests, each with its reason. No literal atol or rtol elsewhere."""

# ------------------------------------------------------------------ tests/sample
LOGIT_RTOL = 1e-6  # processors: float64 rounded once to fp32 against a float64 loop (fp32 eps is 1.2e-7)
PROBABILITY_ATOL = 2e-6  # fp32 logits / temperature of size 20 are rounded by up to 1e-6: so is exp of them
LOGPROB_ATOL = 2e-6  # the same, against log_softmax in float64
CHI_SQUARE_DEVIATIONS = 4.0  # normal deviations; seeds are fixed, a correct sampler exceeds it once in 16,000 choices

# ------------------------------------------------------------------ tests/models
HF_LOGPROB_ATOL = 1e-4  # house law: fp32 networks agree with transformers to this, whatever the order of their sums
HF_TIE_GAP = 1e-4  # below this gap of the two best log-probabilities a greedy choice is a tie
HF_HIDDEN_ATOL = 1e-4  # final hidden states of encoders: layer-normed, so of size 1
LINEAR_RTOL = 1e-5  # one fp32 product of up to 2000 terms against another order of the same sum, times its size

# ------------------------------------------------------------------ tests/kernels
KERNEL_ERROR_FACTOR = 2.0  # house law: twice the reference's own error in that dtype, plus one eps of the largest value
ROUNDED_ONCE = 0.502  # of the dtype's eps: half a step, and a little for a value at the very middle of two
FLOAT64_RTOL = 1e-12  # two float64 ways to one value: an angle of 1000 turns is known to 1e-13, sums to less

# ------------------------------------------------------------------ tests/test_llm.py
UNIT_LENGTH_ATOL = 1e-5  # fp32 vectors of length 1, and their products: alone or in a batch the sums differ in order

# ------------------------------------------------------------------ tests/engine
PLANNED_WEIGHTS_RTOL = 0.01  # a plan counts the checkpoint's numbers; a loaded model holds rotary frequencies as well
