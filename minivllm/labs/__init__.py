"""Eight exercises on the ideas of the engine, with checks that explain: `minivllm lab list | start NAME | check NAME`.

    exercises/        the solved exercises, one file each; `start` copies them without what is between the marks
    workshop.py       files: what `start` writes, how a student's file is loaded
    lab.py            what a lab is, and how it is checked: examples, and the mistakes that explain a wrong answer
    blocks.py         allocate, append_slot, prefix_hash     scheduling.py    chunk_budget, preempt
    mathematics.py    online_softmax, top_p, rejection_sampling
    catalog.py        the table of labs

The right answer to an example is what the engine's own code does with it. A mistake is a small change to the solution
(`<` for `<=`); when a wrong file answers like the solution with that change, its message is the one that is shown.

Knows no model. Called by cli/labs.py. Twin in vLLM: none; tiny-llm is the like.
"""
