"Packaging: everything is read from settings.ini, which nbdev reads too."
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def lines(key):
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


class BuildWithRecords(build_py):
    "Put records and shipped files into the wheel, where `nncomp.results` finds them outside a clone."

    def run(self):
        super().run()
        for name in ("results", "models"):
            source = Path(__file__).parent / name
            if source.is_dir() and not self.editable_mode:
                target = Path(self.build_lib) / "nncomp" / "_book" / name
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)


def readme():
    "The README for a package index, which does not have the pictures beside it."
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    base = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}"
    return re.sub(r'<img src="(?!https?:)([^"]+)"', rf'<img src="{base}/\1?sanitize=true"', text)


book = lines("book_requirements")
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    cmdclass={"build_py": BuildWithRecords},
    packages=find_packages(include=["nncomp", "nncomp.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={"book": book, "dev": book + lines("dev_requirements")},
    entry_points={
        "console_scripts": lines("console_scripts") or [cfg["console_scripts"]],
        "nbdev": ["nncomp=nncomp._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Natural Language :: English",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    zip_safe=False,
)
