"""The C++ library: built and installed without Python and torch, moved, found by examples/cpp."""

import re

import numpy as np
import pytest
from building import ROOT, configure, cxx, run, tool

import ddpm_fast
from ddpm_fast import noise
from ddpm_fast.plan import make_plan
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

# Nothing of this Python's environment; and who looks for a Python all the same does not find it.
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
NO_PYTHON = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("Python", "pybind11", "Torch")]
# Of the same sources the extension has the optimised kernels, to which this library's are compared.
QUICK = "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
INSTALLED = {
    "include/ddpm_fast/arguments.h",
    "include/ddpm_fast/ddpm_fast.h",
    "include/ddpm_fast/version.h",
    "lib/cmake/ddpm_fast/ddpm_fastConfig.cmake",
    "lib/cmake/ddpm_fast/ddpm_fastConfig-release.cmake",
    "lib/cmake/ddpm_fast/ddpm_fastConfigVersion.cmake",
    "lib/libddpm_fast.a",
    "share/doc/ddpm_fast/LICENSE",
}

SHAPE, SEED, SCHEDULE = (3, 32, 32), 7, NoiseSchedule.linear(1000)  # examples/cpp/gaussian.cpp


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Builds and installs with these options; the folder where the result was moved to."""
    folder = tmp_path_factory.mktemp("library")

    def install(name, *options):
        options = ("-DDDPM_FAST_PYTHON=OFF", "-DCMAKE_INSTALL_LIBDIR=lib", QUICK, *options)
        configure(ROOT, folder / "build", *options, *NO_PYTHON, env=BARE)
        run(tool("cmake"), "--build", folder / "build", env=BARE)
        run(tool("cmake"), "--install", folder / "build", "--prefix", folder / "first", env=BARE)
        return (folder / "first").rename(folder / name)

    return install


@pytest.fixture(scope="module")
def static(library):
    return library("static", "-DBUILD_SHARED_LIBS=OFF")


@pytest.fixture(scope="module")
def example(static, tmp_path_factory):
    build = tmp_path_factory.mktemp("example")
    options = [f"-DCMAKE_PREFIX_PATH={static}", f"-DCMAKE_CXX_FLAGS={' '.join(STRICT)}"]
    configure(ROOT / "examples" / "cpp", build, *options, *NO_PYTHON, env=BARE)
    run(tool("cmake"), "--build", build, env=BARE)
    return build / "gaussian"


def predict_eps(x, t):
    """The example's network."""
    ac = SCHEDULE.alphas_cumprod[int(t[0])]
    center = np.float32(np.sqrt(ac) * 0.3)
    gain = np.float32(np.sqrt(1.0 - ac) / (ac * 0.2 * 0.2 + 1.0 - ac))
    return float(gain) * (x - float(center))


def drawn(backend, **options):
    """What the example writes: the samples, and the same noised again."""
    sampler = Sampler(predict_eps, SCHEDULE, SHAPE, backend=backend, **options)
    samples = sampler.sample(16, seed=SEED).numpy()
    keep, root = (
        np.float32(table[-1])
        for table in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
    )
    z = noise.randn(SEED, range(16), 0, SHAPE, noise.Q_SAMPLE)
    return samples.tobytes() + (keep * samples + root * z).tobytes()


def test_what_is_installed(static):
    files = {p.relative_to(static).as_posix() for p in static.rglob("*") if p.is_file()}
    assert files == INSTALLED


def test_example_draws_what_python_draws(example, tmp_path):
    want = drawn("auto")
    for level in ("baseline", ""):  # the lowest and the best
        said = run(example, tmp_path / "out.f32", env={"DDPM_FAST_CPU": level})
        assert f"ddpm_fast {ddpm_fast.__version__} on {level}" in said and "1000 steps" in said
        assert (tmp_path / "out.f32").read_bytes() == want
    numbers = [float(number) for number in re.findall(r"-?\d\.\d{3}", said)]
    assert np.allclose(numbers, [0.3, 0.2, 0.3, 0.2, 0.0, 1.0, 0.0, 1.0], atol=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ddim", "steps": 12, "eta": 0.7, "use_clipped_model_output": False},
        {"method": "dpmpp_2m", "steps": 10, "spacing": "trailing"},
    ],
    ids=lambda options: options["method"],
)
def test_example_takes_a_table_that_python_wrote(example, tmp_path, options):
    plan = make_plan(SCHEDULE, **options)
    out, coefficients, index = (tmp_path / name for name in ("out.f32", "c.f32", "i.i32"))
    plan.coefficients.numpy().tofile(coefficients)
    plan.index.numpy().tofile(index)
    run(example, out, coefficients, index)
    assert out.read_bytes() == drawn("reference", **options)


def check_library(build, prefix, *link):
    command = [cxx(), "-std=c++17", *STRICT, f"-I{prefix}/include"]
    command += [ROOT / "tests" / "library_check.cpp", "-o", build / "check", *link, "-pthread"]
    run(*command, env=BARE)
    said = run(build / "check", env=BARE)
    assert f"{ddpm_fast.__version__}, noise {noise.VERSION}" in said and "all as it should" in said


def test_library_refuses_what_is_wrong(static, tmp_path):
    check_library(tmp_path, static, static / "lib" / "libddpm_fast.a")


def test_shared_library_shows_its_functions_alone(library, static, tmp_path):
    shared = library("shared", "-DBUILD_SHARED_LIBS=ON") / "lib"
    link = ["-DDDPM_FAST_SHARED", f"-L{shared}", "-lddpm_fast", f"-Wl,-rpath,{shared}"]
    check_library(tmp_path, shared.parent, *link)
    symbols = run(tool("nm"), "-DC", "--defined-only", shared / "libddpm_fast.so")
    functions = set(re.findall(r" ddpm_fast::(\w+)\(", symbols))
    assert functions == {"randn", "q_sample", "p_sample_step", "cpu_level"}


def test_library_as_a_part_of_another_project(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.22)\nproject(game LANGUAGES CXX)\n"
        f'add_subdirectory("{ROOT}" ddpm_fast)\n'
        f"add_executable(game game.cpp)\ntarget_link_libraries(game ddpm_fast::ddpm_fast)\n"
    )
    (tmp_path / "game.cpp").write_text("#include <ddpm_fast/ddpm_fast.h>\nint main() {}\n")
    configure(tmp_path, tmp_path / "build", *NO_PYTHON, env=BARE)
    object_file = "CMakeFiles/game.dir/game.cpp.o"
    run(tool("ninja"), "-C", tmp_path / "build", object_file, env=BARE)
