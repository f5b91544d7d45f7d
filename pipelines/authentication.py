"""The token that a cluster asks for."""

from __future__ import annotations

import os

import grpc
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.exceptions import AuthenticationError

from craft_ray.errors import ConfigError

PATIENCE_S = 10


def check_token(address: str) -> None:
    """Ask the cluster at `address` (as in RAY_ADDRESS) whether it takes our token.

    Ray itself tries for twenty seconds and tells the reason in its own log alone. A cluster that does not answer is
    passed over here, for Ray waits for one that is just starting; so is "auto", where Ray finds the token as well.

    Raises:
        ConfigError: it does not.
    """
    place = None if address == "auto" or "://" in address else services.canonicalize_bootstrap_address(address)
    if place is None:
        return
    try:
        with init_grpc_channel(place) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=PATIENCE_S)
    except AuthenticationError:
        raise refused(address) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused(address) from None


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
