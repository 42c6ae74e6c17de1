"""What can go wrong between here and the Hub, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version of the client has
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import LayerRopeError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(LayerRopeError):
    """The Hub did not do what was asked; the message says why, and what to do."""


class InvalidRepoIdError(HubError, ValueError):
    """This cannot be the id of a repository."""


class NotLoggedInError(HubError, PermissionError):
    """There is no token, or the Hub does not accept it."""


class NoPermissionError(HubError, PermissionError):
    """The token is known, and may not do this."""


class RepoNotFoundError(HubError, FileNotFoundError):
    """There is no such repository, or it is not visible to this user."""


class NoSuchRevisionError(HubError, FileNotFoundError):
    """The repository has no such branch, tag or commit."""


class NoSuchFileError(HubError, FileNotFoundError):
    """The repository lacks a file of an adapter."""


class HubUnreachableError(HubError, ConnectionError):
    """There is no connection to the Hub, or it does not answer."""


class PullTargetError(LayerRopeError, FileExistsError):
    """The folder to pull into holds something that a pull did not put there."""


def check_repo_id(repo_id: str) -> None:
    """Raises InvalidRepoIdError unless `repo_id` is `name` or `owner/name` as the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidRepoIdError(
            f"repo_id={repo_id!r} is no id of the Hub, such as owner/name: {_line(error)}"
        ) from error


@contextmanager
def hub_errors(action: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub client's errors into ours.

    Args:
        action: what is being done, for messages: "pull", "push to".
        repo_id: the repository.
        revision: of it; None: main.
    """
    what = f"cannot {action} {repo_id!r}"
    try:
        yield
    except LayerRopeError:  # says what is wrong already
        raise
    except GatedRepoError as error:
        raise NoPermissionError(f"{what}: it is gated; ask for access on its page, and {_LOG_IN}.") from error
    except RepositoryNotFoundError as error:
        raise RepoNotFoundError(f"{what}: there is no such repository, or it is private: {_LOG_IN}.") from error
    except RevisionNotFoundError as error:
        raise NoSuchRevisionError(f"{what}: it has no revision {revision or 'main'!r}.") from error
    except LocalTokenNotFoundError as error:
        raise NotLoggedInError(f"{what}: you are not logged in; {_LOG_IN}.") from error
    except OfflineModeIsEnabled as error:
        raise _unreachable(what, error) from error
    except LocalEntryNotFoundError as error:  # "not in the cache", because of what happened before
        raise _unreachable(what, error.__cause__ or error) from error
    except EntryNotFoundError as error:
        raise NoSuchFileError(f"{what}: it has no {str(error.response.url).rsplit('/', 1)[-1]}.") from error
    except HfHubHTTPError as error:
        raise _of_status(what, error) from error
    except HTTPError as error:
        raise _unreachable(what, error) from error
    except (OSError, ValueError) as error:  # a full disk, a card that the Hub refuses
        raise HubError(f"{what}: {_line(error)}") from error


def _unreachable(what: str, error: BaseException) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(f"{what}: HF_HUB_OFFLINE is set; unset it to go online.")
    if isinstance(error, HfHubHTTPError):
        return _of_status(what, error)
    return HubUnreachableError(f"{what}: no connection to the Hub ({_line(error)}).")


def _of_status(what: str, error: HfHubHTTPError) -> HubError:
    status, said = error.response.status_code, error.server_message
    reason = " ".join(str(said).split())[:200] if said else _line(error)
    if status == 401:
        return NotLoggedInError(
            f"{what}: there is no such repository, it is private, or the Hub does not accept your login: {_LOG_IN}."
        )
    if status == 403:
        return NoPermissionError(f"{what}: your token may not do this ({reason}); use one that can write there.")
    if status >= 500 or status in (408, 429):
        return HubUnreachableError(f"{what}: the Hub answered {status}, also when asked again; try later ({reason}).")
    return HubError(f"{what}: the Hub answered {status}: {reason}")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
