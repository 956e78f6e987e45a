"""FID and KID on published features, against a reference file that :func:`write_reference` makes."""

from lethebench.metrics.frechet._reference import write_reference
from lethebench.metrics.frechet.metric import FID, KID

__all__ = ["FID", "KID", "write_reference"]
