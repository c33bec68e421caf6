"""What pyproject.toml cannot say: a wheel brings the native library along, for every instruction set of this kind of
processor. Without a compiler the wheel comes without, says so, and octad compiles at the first use. Editable installs
and source archives always come without.
"""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# by its path: importing the package would need its dependencies
_spec = importlib.util.spec_from_file_location(
    "octad_build", Path(__file__).with_name("octad") / "kernels" / "compile.py"
)
native = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = native
_spec.loader.exec_module(native)


def library(build_lib: str) -> Path:
    """Where the library lies among the built modules."""
    return Path(build_lib, "octad", "kernels", native.PACKAGED.name)


class BuildNative(build_py):
    """build_py, and the library beside the modules."""

    def run(self) -> None:
        """Copy the modules, then compile, except for an editable install."""
        super().run()
        if self.editable_mode:
            return
        try:
            refused = native.compile_all(library(self.build_lib))
        except native.BuildError as error:
            self.warn(f"{error}; the wheel comes without the native library")
            return
        for isa, reason in refused.items():
            self.warn(f"the compiler does not know {isa} ({reason}); the library comes without it")


class PlatformWheel(bdist_wheel):
    """bdist_wheel, named after the platform, any Python 3: the library is called through ctypes."""

    def run(self) -> None:
        """Build first: whether there is a library decides what kind of wheel this is."""
        self.run_command("build")
        self.root_is_pure = not self._library().is_file()
        self.distribution.has_ext_modules = lambda: (
            not self.root_is_pure
        )  # then files are of the platform, too
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Of the platform; on Linux with the oldest glibc that serves."""
        if not self._library().is_file():
            return super().get_tag()
        platform = super().get_tag()[2]
        # the newest symbols of glibc that the library asks for
        versions = re.findall(rb"GLIBC_2\.(\d+)", self._library().read_bytes())
        if platform.startswith("linux_") and versions:
            platform = platform.replace("linux_", f"manylinux_2_{max(17, *map(int, versions))}_", 1)
        return "py3", "none", platform

    def _library(self) -> Path:
        return library(self.get_finalized_command("build_py").build_lib)


setup(cmdclass={"build_py": BuildNative, "bdist_wheel": PlatformWheel})
