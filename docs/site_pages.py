"""A hook of MkDocs: the site has the pages of the repository at the paths that they have there, and finds its package.

Pages at the root (README.md, ...) are next to docs/, as in the repository, so that a link works in both places and no text is copied.
The root is the package `wherefrom`, but a checkout's folder may have any name and holds more than the package (tests, an environment).
What reads the docstrings therefore gets a folder of that name, with links to the package's own files.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

_package = TemporaryDirectory(prefix="wherefrom-site-")


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tell mkdocstrings where the package is."""
    package = Path(_package.name) / "wherefrom"
    package.mkdir(exist_ok=True)
    for path in _root(config).iterdir():
        link = package / path.name
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and not link.is_symlink():
            link.symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_package.name]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Move the files of docs/ below docs/ on the site, and add the pages at the root and the notebooks."""
    root = _root(config)

    def placed(path: Path) -> File:
        return File(path.relative_to(root).as_posix(), str(root), config.site_dir, config.use_directory_urls)

    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            moved = placed(Path(file.src_dir).resolve() / file.src_uri)
            moved.inclusion = file.inclusion
            files.append(moved)
    for page in sorted([*root.glob("*.md"), *root.glob("examples/*.ipynb")]):
        files.append(placed(page))
    return files
