"""A web application in, the page to talk to its bot added at `/`: the files that `make web` built, and nothing else.

Knows nothing of the bot; what the page and a bot say to each other is in bots/web/README.md.
"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

BUILT = Path(__file__).parent / "web" / "built"


def mount_page(app: FastAPI, built: Path = BUILT) -> None:
    """Serve the page at `/` and its files under `/page/`; to be called before the runner's `main()`.

    The first route of a path wins, so the runner's redirect of `/` to its own client gives way; all its other routes
    stay, that client at `/client/` among them.

    Raises:
        FileNotFoundError: The page was not built.
    """
    index = built / "index.html"
    if not index.is_file():
        raise FileNotFoundError(f"the page should be in {built}, but index.html is missing: run `make web`")

    async def page() -> FileResponse:
        # The files under /page/ carry a version in their query; the page that names it must be fresh.
        return FileResponse(index, headers={"Cache-Control": "no-cache"})

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/page", StaticFiles(directory=built), name="page")
