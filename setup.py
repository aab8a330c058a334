"""Everything about the package is declared once, in settings.ini, which nbdev reads too."""

from configparser import ConfigParser

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    license="Apache-2.0",
    author=settings["author"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in ("dev", "bench")},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "papermill.engine": [
            f"{settings['lib_path']}={settings['lib_path']}.pipeline.engine:papermill_engine"
        ],  # signals reach the kernel of any notebook that papermill runs here
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
)
