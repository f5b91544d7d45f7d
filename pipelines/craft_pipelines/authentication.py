"""Authentication by the token that a cluster requires."""

from __future__ import annotations

import os

import grpc
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.exceptions import AuthenticationError

from craft_ray.errors import ConfigError

TIMEOUT_S = 30
"""How long a cluster may take to answer: it may be starting."""
PROBE_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The gRPC method that every Ray process calls first on a cluster."""


def check_access(address: str) -> None:
    """Check that the cluster at `address` (as in RAY_ADDRESS) accepts this process.

    Ray itself retries for minutes, and reports the reason only in its log. "auto" is skipped: there Ray finds the token
    as well as the cluster.

    Raises:
        ConfigError: the cluster refuses us.
        ConnectionError: the cluster does not answer.
    """
    target = None if address == "auto" or "://" in address else services.canonicalize_bootstrap_address(address)
    if target is None:
        return
    try:
        with init_grpc_channel(target) as channel:
            channel.unary_unary(PROBE_METHOD)(b"", timeout=TIMEOUT_S, wait_for_ready=True)
    except AuthenticationError:
        raise refused(address) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused(address) from None
        raise ConnectionError(f"{error.code().name} after {TIMEOUT_S} s") from None


def refused(address: str) -> ConfigError:
    """The error for a user whom a cluster refuses: what they have set, and what is missing."""
    mode, token, path = (os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if (mode or "").lower() != "token":
        have = f"RAY_AUTH_MODE is {mode or 'not set'}, so no token is sent"
    elif token:
        have = "the token in RAY_AUTH_TOKEN is not the cluster's"
    elif path and not os.path.isfile(path):
        have = f"RAY_AUTH_TOKEN_PATH is {path}, and there is no such file"
    elif path:
        have = f"the token in {path} (RAY_AUTH_TOKEN_PATH) is not the cluster's"
    else:
        have = "neither RAY_AUTH_TOKEN nor RAY_AUTH_TOKEN_PATH is set, and ~/.ray/auth_token is not the cluster's"
    return ConfigError(
        f"the cluster at {address} requires a token and refuses us ({have}): set RAY_AUTH_MODE=token, and set "
        f"RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_TOKEN to the token itself"
    )


def accepts_anyone(address: str) -> bool:
    """Whether the cluster at `address` (host:port) answers a client that has neither token nor certificate."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(PROBE_METHOD)(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE):
                return False  # without a token; without TLS
            raise ConfigError(f"the cluster at {address} does not answer ({error.details()}): try again") from None
    return True
