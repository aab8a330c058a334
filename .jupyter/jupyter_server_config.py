"""A stage's notebook is saved as nbdev_clean writes it, so that running it in JupyterLab does not make its DVC stage stale. All others are saved as they are."""
from pathlib import Path

STAGES = {"prepare", "train", "backtest", "report", "walk_forward", "seeds", "portfolio_prepare", "portfolio_train", "portfolio_backtest", "portfolio_report"}
NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


def clear_outputs(model, path, contents_manager, **_):
    "Drop a stage notebook's outputs, execution counts and what the server learns from the kernel, and which kernel that was; tags stay."
    file = Path(contents_manager.root_dir, path.strip("/")).resolve()
    if file.parent != NOTEBOOKS or file.stem not in STAGES or model["type"] != "notebook" or model["content"]["nbformat"] != 4: return
    for cell in model["content"]["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name == "tags"}
        if cell["cell_type"] == "code": cell["outputs"], cell["execution_count"] = [], None
    model["content"]["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


c.FileContentsManager.pre_save_hook = clear_outputs  # noqa: F821  (`c` is given by Jupyter)
