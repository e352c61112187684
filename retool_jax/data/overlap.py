"""Questions that are also (nearly) in another set, such as a benchmark."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from retool_jax.data.instructions import question_of

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|\d+")  # each Chinese character is a word


@dataclass(frozen=True)
class Overlap:
    """Question `index` shares `share` of its n-grams with question `reference` of the other set; 1.0: same words."""

    index: int
    reference: int
    share: float


def overlaps(questions: Sequence[str], references: Sequence[str], size: int = 8, least: float = 0.5) -> list[Overlap]:
    """Questions that are also (nearly) among `references`, each with the nearest one.

    The words are compared, without case, punctuation and LaTeX's signs. The share is the number of common n-grams of
    `size` words relative to the shorter question. A question with fewer words must be equal in all of them.
    """
    theirs = [_ngrams(text, size) for text in references]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for reference, grams in enumerate(theirs):
        for gram in grams:
            holders[gram].append(reference)
    found = []
    for index, text in enumerate(questions):
        mine = _ngrams(text, size)
        common = Counter(reference for gram in mine for reference in holders.get(gram, ()))
        shares = [(count / min(len(mine), len(theirs[r])), -r) for r, count in common.items()]
        share, reference = max(shares, default=(0.0, 0))
        if share >= least:
            found.append(Overlap(index, -reference, share))
    return found


def _ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    words = _WORD.findall(unicodedata.normalize("NFKC", question_of(text)).casefold())
    return {tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))} if words else set()
