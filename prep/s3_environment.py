"""The settings that the AWS tools take from the environment, as options of a store."""

from __future__ import annotations

import os
from typing import Any


def s3_environment() -> dict[str, Any]:
    """Return the settings that the AWS tools take from the environment."""
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "access_key_id": ("AWS_ACCESS_KEY_ID",),
        "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
        "session_token": ("AWS_SESSION_TOKEN",),
    }
    found: dict[str, Any] = {"region": "us-east-1"}
    for option, variables in names.items():
        values = [os.environ[name] for name in variables if os.environ.get(name)]
        if values:
            found[option] = values[0]
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        found["skip_signature"] = True
    if "endpoint" in found:
        found["virtual_hosted_style_request"] = False
    return found
