"""Notebooks are saved as nbdev_clean writes them, so that running a stage notebook in JupyterLab does not make its DVC stage stale."""


def clear_outputs(model, **_):
    "Drop outputs, execution counts and what the server learns from the kernel; tags stay."
    if model["type"] != "notebook" or model["content"]["nbformat"] != 4: return
    for cell in model["content"]["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name == "tags"}
        if cell["cell_type"] == "code": cell["outputs"], cell["execution_count"] = [], None
    kernel = model["content"]["metadata"].get("kernelspec", {}).get("name", "python3")
    model["content"]["metadata"] = {"kernelspec": {"display_name": kernel, "language": "python", "name": kernel}}


c.FileContentsManager.pre_save_hook = clear_outputs  # noqa: F821  (`c` is given by Jupyter)
