"""Figures of tokens, for notebooks and for pages without a script.

    token_heatmap(output)                 every token on a colour for how sure the model was of it
    compare(output, other)                two runs side by side, the first difference marked

Both take what LLM.generate returns and give a Figure: HTML by itself, `_repr_html_` for notebooks, `save` for a file.
Knows no engine. Called by whoever looks at answers. Twin in vLLM: none; in circuitsvis colored_tokens.
"""

from minivllm.figures.comparison import Comparison, compare, compare_tokens
from minivllm.figures.heatmap import token_heatmap
from minivllm.figures.page import Figure
from minivllm.figures.tokens import Token, tokens_of

__all__ = ["Comparison", "Figure", "Token", "compare", "compare_tokens", "token_heatmap", "tokens_of"]
