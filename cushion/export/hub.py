"""Upload of an exported folder to the hub, where the user asks for it."""

from __future__ import annotations

from pathlib import Path

from cushion.errors import ArtifactError


def push(folder: Path, repository: str) -> str:
    """Upload a folder, into a private repository where there is none of this name; returns its address.

    Raises:
        ArtifactError: the hub cannot be reached or refuses.

    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of Cushion")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(
            f"{folder} is written, but --push={repository!r} failed: {reason}; log in with `hf auth login`, then "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(address)
