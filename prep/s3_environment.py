"""The settings that the AWS tools take from the environment, as options of a store."""

from __future__ import annotations

import os
from typing import Any


def with_s3_environment(given: dict[str, Any]) -> dict[str, Any]:
    """Return a store's options, those that are not `given` taken from the environment.

    Credentials come from one place: given keys are not mixed with the environment's session token,
    nor with its wish that nothing be signed.
    """
    found = _s3_environment()
    if "access_key_id" in given:
        found.pop("session_token", None)
        found["skip_signature"] = False  # said: obstore reads the variables of what is absent
    return {**found, **given}


def without_other_token(options: dict[str, Any]) -> dict[str, Any]:
    """Return what keeps obstore from signing keys that have no session token with a variable's.

    An empty token would be sent as an empty header, which not every store takes.
    """
    keys = {"access_key_id", "secret_access_key"}
    if "AWS_SESSION_TOKEN" not in os.environ or {"session_token", "token"} & options.keys():
        return {}
    if not keys <= options.keys():
        return {}
    credentials = {**{key: options[key] for key in keys}, "expires_at": None}
    return {"credential_provider": lambda: credentials}


def _s3_environment() -> dict[str, Any]:
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
