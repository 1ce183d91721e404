"""Checkpoints at s3://: Orbax gives TensorStore `gs://` alone, and takes all else for files.

TensorStore has a driver for S3. So the two functions of Orbax that choose a driver are replaced:
both are its own, and tests/test_bucket_runs.py would tell if a version had them no more.
"""

import functools
import os
import re
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from lazyattn.errors import InputError

_URL = re.compile(r"s3:/+(?P<bucket>[^/]+)/*(?P<path>.*)")  # Orbax may leave one slash of two
# A store that isn't Amazon's takes any region.
_REGION = "us-east-1"


def spec(url: str) -> dict[str, Any]:
    """Returns TensorStore's description of a folder in a bucket of S3.

    Endpoint, region and keys are those of the environment (`AWS_ENDPOINT_URL`, `AWS_REGION`,
    `AWS_ACCESS_KEY_ID`), as s3fs finds them; without them they are Amazon's, the bucket's own,
    and those of the profile or the machine.
    """
    match = _URL.fullmatch(url)
    assert match is not None, url
    found: dict[str, Any] = {"driver": "s3", **match.groupdict()}
    variables = os.environ
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    if endpoint:
        found["endpoint"] = endpoint
        region = variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION")
        found["aws_region"] = region or _REGION
    if "AWS_ACCESS_KEY_ID" in variables:
        found["aws_credentials"] = {"type": "environment"}
    return found


@functools.cache
def teach_orbax() -> None:
    """Has Orbax read and write arrays at s3://.

    Raises:
      InputError: if this version of Orbax can't be taught.
    """
    try:
        use, make = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    except AttributeError as error:
        raise InputError(
            "--workdir is in a bucket of S3, for which this version of orbax-checkpoint lacks"
            f" something ({error}); install the version in requirements.txt."
        ) from None
    tensorstore_utils._use_gcs_driver = lambda path: bool(_URL.fullmatch(path)) or use(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: spec(path) if _URL.fullmatch(path) else make(path)
