"""When a benchmark with faults is refused."""

import pytest

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.benchmark import Findings, check


def test_every_count_beyond_the_share_is_named_with_its_first_case():
    findings = Findings(
        images_listed=10, captions_listed=50, missing_images=1, unknown_ids=6,
        empty_captions=5, duplicate_captions=50, duplicate_image_ids=10,
        images_without_caption=10, examples={"unknown_ids": "line 7, 'x'"},
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        check(findings, source="flickr")
    assert str(caught.value) == (
        "flickr: 1 of 10 images are not on the disk; 6 of 50 captions name an image that is not "
        "listed (first: line 7, 'x'); 5 of 50 captions are empty; at most 0.0% may be so"
    )
    with pytest.raises(DataError, match=r"^flickr: 6 of 50 captions name"):
        check(findings, source="flickr", allowed_share=0.1)
    check(findings, source="flickr", allowed_share=0.12)
