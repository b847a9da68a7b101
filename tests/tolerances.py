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
HF_ACTIVATION_RTOL = 1e-5  # of a point's largest value, at least 1: fp32 sums of up to 200 terms, 4 layers deep
LINEAR_RTOL = 1e-5  # one fp32 product of up to 2000 terms against another order of the same sum, times its size
PARALLEL_RTOL = 1e-5  # fp32 logits of several ranks against one, of the largest: sums of parts have another order
PARALLEL_LOGPROB_ATOL = 5e-5  # the same of log-probabilities: the tiny models' logits are of size 5 to 40
INT8_ROW_STEP = 0.502 / (127 * 256)  # of a row's largest value: half a step of its two digits, and fp32's own rounding
BF16_STEP = 0.502 * 2**-7  # half a step of bfloat16, of the value, and a little for sums in float32
INT4_LEVEL = 8 * BF16_STEP  # of the step between two codes: up to 8 of them, with a scale in bfloat16
SAME_NETWORK_RMS = 0.03  # of logits: two bfloat16 roundings of one tiny network, int8 codes where there are many rows
OUTLIER_RMS = 0.005  # what one value of 300 among normal ones costs the product: 300 / 65,024 on each of them

# ------------------------------------------------------------------ tests/kernels
COMPILED_EXP = 3e-7  # relative: a polynomial in float32 within two units in the last place, 1.2e-7 each
KERNEL_ERROR_FACTOR = 2.0  # house law: twice the reference's own error in that dtype, plus one eps of the largest value
ROUNDED_ONCE = 0.502  # of the dtype's eps: half a step, and a little for a value at the very middle of two
FLOAT64_RTOL = 1e-12  # two float64 ways to one value: an angle of 1000 turns is known to 1e-13, sums to less
# RMS(error) / RMS(output) of attention over a cache of codes, for normal values in rows of 64 and queries of size 2:
INT8_ATTENTION_RMS = 0.02  # a value is off by 0.6 % of the row's RMS (a scale is 2.5 sigma / 127), the scores add to it
E4M3_ATTENTION_RMS = 0.08  # a value is off by 2.6 % of itself: 3 bits behind the point; the scores add to it
LOG_SUM_EXP_ATOL = 1e-5  # in base 2, of scores of size 10: fp32 products of 64 terms, and a sum of 200

# RMS(error) / RMS(output) of a product with quantised normal weights:
INT8_WEIGHT_RMS = 0.01  # a step is 3 sigma / 127 of a row of 384, and a weight is off by 0.29 of it: 0.7 %
INT4_WEIGHT_RMS = 0.12  # a step is a group's range / 15: 4 sigma in groups of 32, 5.5 in 128; 0.29 of it is 8 to 11 %

# ------------------------------------------------------------------ tests/test_llm.py
UNIT_LENGTH_ATOL = 1e-5  # fp32 vectors of length 1, and their products: alone or in a batch the sums differ in order

# ------------------------------------------------------------------ tests/engine
PLANNED_WEIGHTS_RTOL = 0.01  # a plan counts the checkpoint's numbers; a loaded model holds rotary frequencies as well
WHOLE_STEP = (
    2**-6
)  # of the largest hidden state: the modules and the whole step round alike, sums may be in other order
