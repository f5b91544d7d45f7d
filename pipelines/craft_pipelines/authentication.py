"""The token that a cluster asks for."""

from __future__ import annotations

import os

import grpc
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.exceptions import AuthenticationError

from craft_ray.errors import ConfigError

PATIENCE_S = 30
"""How long a cluster may take to answer: it may be just starting."""
QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The first thing that every process of Ray asks of a cluster, as gRPC names it."""


def knock(address: str) -> None:
    """Ask the cluster at `address` (as in RAY_ADDRESS) whether it lets us in.

    Ray itself asks for minutes, and tells the reason in its own log alone. Passed over is "auto", where Ray finds the
    token as well as the cluster.

    Raises:
        ConfigError: it refuses us.
        ConnectionError: it does not answer.
    """
    place = None if address == "auto" or "://" in address else services.canonicalize_bootstrap_address(address)
    if place is None:
        return
    try:
        with init_grpc_channel(place) as channel:
            channel.unary_unary(QUESTION)(b"", timeout=PATIENCE_S, wait_for_ready=True)
    except AuthenticationError:
        raise refused(address) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused(address) from None
        raise ConnectionError(f"{error.code().name} after {PATIENCE_S} s") from None


def refused(address: str) -> ConfigError:
    """What a user is told where a cluster does not let them in: what they have set, and what is missing."""
    mode, token, path = (os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if (mode or "").lower() != "token":
        have = f"RAY_AUTH_MODE is {mode or 'not set'}, so no token is sent"
    elif token:
        have = "the token in RAY_AUTH_TOKEN is not the cluster's"
    elif path and not os.path.isfile(path):
        have = f"RAY_AUTH_TOKEN_PATH is {path}, and no file is there"
    elif path:
        have = f"the token in {path} (RAY_AUTH_TOKEN_PATH) is not the cluster's"
    else:
        have = "neither RAY_AUTH_TOKEN nor RAY_AUTH_TOKEN_PATH is set, and ~/.ray/auth_token is not the cluster's"
    return ConfigError(
        f"the cluster at {address} asks for a token and refuses us ({have}): set RAY_AUTH_MODE=token, and name a file "
        f"with the cluster's token in RAY_AUTH_TOKEN_PATH, or the token itself in RAY_AUTH_TOKEN"
    )


def lets_anyone_in(address: str) -> bool:
    """Whether the cluster at `address` (host:port) answers who has neither token nor certificate."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(QUESTION)(b"", timeout=PATIENCE_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE):
                return False  # without a token; without TLS
            raise ConfigError(f"the cluster at {address} does not answer ({error.details()}): try again") from None
    return True
