"""`Calibration`: a bundle's map from the cosine of a text and an image to a probability."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from vlm.errors import VlmError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How probable it is that a text and an image match, by their cosine.

    The map is linear between its knots and constant beyond the first and the last.

    Raises:
        VlmError: the knots do not rise, or a probability is not between 0 and 1.
    """

    cosines: Sequence[float]
    """Where the knots lie, in rising order; two in one place make a step."""
    probabilities: Sequence[float]
    """The probability of a match at each knot, strictly between 0 and 1; it never falls."""
    prior: float
    """The ratio of matching pairs, between 0 and 1, that the probabilities assume."""
    threshold: float
    """Cosine from which a pair counts as a match at the target precision."""
    precision: float
    """The target: ratio of matches among the pairs from the threshold on, at the prior."""
    dim: int
    """Width of the vectors whose cosines were seen."""
    fingerprint: str
    """Names the model that gave the vectors."""
    fitted_on: Mapping[str, Any]
    """What the map was fitted on, for people to read."""

    def __post_init__(self) -> None:
        cosines, probabilities = np.asarray(self.cosines), np.asarray(self.probabilities)
        ratios = [*probabilities.tolist(), self.prior]
        if (
            len(cosines) != len(probabilities)
            or not len(cosines)
            or not (np.diff(cosines) >= 0).all()
            or not (np.diff(probabilities) >= 0).all()
            or not all(0 < ratio < 1 for ratio in ratios)
        ):
            raise VlmError(
                f"a calibration has {len(cosines)} cosines, {len(probabilities)} probabilities and "
                f"the prior {self.prior}; expected as many of each, rising, and probabilities "
                "between 0 and 1"
            )

    def probability(
        self, cosines: Float[np.ndarray, "*shape"], *, prior: float | None = None
    ) -> Float[np.ndarray, "*shape"]:
        """Return the probability in (0, 1) that a pair with such a cosine matches.

        Args:
            cosines: Cosines of texts with images.
            prior: Ratio of matching pairs among those asked about; None for the one fitted with.
                By Bayes' rule the odds of a match grow in proportion to the odds of the prior.

        Raises:
            VlmError: the prior is not between 0 and 1.
        """
        found: NDArray[np.float64] = np.interp(cosines, self.cosines, self.probabilities)
        if prior is not None:
            if not 0 < prior < 1:
                raise VlmError(f"the prior is {prior}; expected a ratio between 0 and 1")
            right = found * (prior / self.prior)
            wrong = (1 - found) * ((1 - prior) / (1 - self.prior))
            found = right / (right + wrong)
        return found.astype(cosines.dtype)

    def record(self) -> dict[str, Any]:
        """Return what `vlm.json` says of it."""
        return asdict(self)


def calibration_from_record(record: Any) -> Calibration:
    """Read what `Calibration.record` returned.

    Raises:
        VlmError: it is not such a record.
    """
    names = {field.name for field in fields(Calibration)}
    if not isinstance(record, Mapping) or set(record) != names:
        found = sorted(record) if isinstance(record, Mapping) else record
        raise VlmError(f"unexpected keys in calibration: {found!r:.200}; expected {sorted(names)}")
    try:
        return Calibration(
            cosines=[float(cosine) for cosine in record["cosines"]],
            probabilities=[float(each) for each in record["probabilities"]],
            prior=float(record["prior"]),
            threshold=float(record["threshold"]),
            precision=float(record["precision"]),
            dim=int(record["dim"]),
            fingerprint=str(record["fingerprint"]),
            fitted_on=dict(record["fitted_on"]),
        )
    except (TypeError, ValueError) as error:
        raise VlmError(f"a calibration holds something else than numbers: {error}") from error
