"""How TensorStore is told of a folder in a bucket of S3."""

import pytest
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from lazyattn.checkpoint import s3
from lazyattn.errors import InputError


@pytest.fixture
def environment(monkeypatch):
    for name in ("ENDPOINT_URL", "ENDPOINT_URL_S3", "REGION", "DEFAULT_REGION", "ACCESS_KEY_ID"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    return monkeypatch


@pytest.mark.parametrize("url", ["s3://b/runs/one", "s3:/b/runs/one"])
def test_amazons_own(environment, url):
    assert s3.spec(url) == {"driver": "s3", "bucket": "b", "path": "runs/one"}


def test_another_store_and_keys(environment):
    environment.setenv("AWS_ENDPOINT_URL", "http://store")
    environment.setenv("AWS_ACCESS_KEY_ID", "key")
    found = s3.spec("s3://b/x")
    assert (found["endpoint"], found["aws_region"]) == ("http://store", "us-east-1")
    assert found["aws_credentials"] == {"type": "environment"}
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://nearer")
    environment.setenv("AWS_REGION", "auto")
    found = s3.spec("s3://b/x")
    assert (found["endpoint"], found["aws_region"]) == ("http://nearer", "auto")


@pytest.fixture
def afresh(monkeypatch):
    """Orbax as it was, before and after."""
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", gcs_utils.get_kvstore_for_gcs)
    use = tensorstore_utils._use_gcs_driver
    monkeypatch.setattr(tensorstore_utils, "_use_gcs_driver", use)
    s3.teach_orbax.cache_clear()
    yield monkeypatch
    s3.teach_orbax.cache_clear()


def test_orbax_learns_it_and_forgets_nothing(afresh, tmp_path):
    s3.teach_orbax()
    drivers = [
        tensorstore_utils.build_kvstore_tspec(path)["base"]["driver"]
        for path in ("s3://b/x", "gs://b/x", str(tmp_path))
    ]
    assert drivers == ["s3", "gcs", "file"]


def test_an_orbax_that_can_not_be_taught(afresh):
    afresh.delattr(tensorstore_utils, "_use_gcs_driver")
    with pytest.raises(InputError, match=r"^--workdir is in a bucket of S3, .*_use_gcs_driver"):
        s3.teach_orbax()
