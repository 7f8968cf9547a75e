"""Texts on which a tokenizer is tried, and compared with another reading of its files."""

TRIALS = (
    "def f(x):\n    return 'Hello, wörld 😀' + str(0)\t\n",
    " two  spaces",
    "It's 12345.678, isn't it?\r\n\n ÀÉÎ ﬁ x²",
    "汉字 и кириллица",
)
"""Texts that tokenizers of different kinds split, normalize or begin in different ways."""

MAX_PIECES = 2000
"""How many of a tokenizer's own tokens are tried, too."""


def tried_ids(size: int) -> range:
    """The ids of those tokens, evenly spread over a vocabulary."""
    return range(0, size, max(1, size // MAX_PIECES))
