r"""Is an answer right? The last box of a text is normalised and compared with the truth.

verdict = check(r"So it is \boxed{0.5}.", r"\frac{1}{2}")
print(verdict.correct, verdict.reason)
"""

from retool_jax.answers.check import Verdict, check, check_all
from retool_jax.answers.extract import extract_boxed
from retool_jax.answers.normalise import normalise

__all__ = ["Verdict", "check", "check_all", "extract_boxed", "normalise"]
