"""Sources become cubins without a GPU: compiled, found again, shipped, or refused in one line."""

import itertools
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megakernel import build, kernels, launch, nvrtc
from megakernel.build import ARCHITECTURES, BuildError, Cubin
from megakernel.gpu import Gpu
from megakernel.prebuild import GPUS, MODELS
from megakernel.shape import Shape
from tests import sass

TOY = Path(__file__).parent / "toy"
SIZES = {"THREADS": 128, "STEPS": 3, "EPSILON": 1e-6}

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is there on Linux alone")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPECAT_QWEN3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "CUBINS", tmp_path / "cubins")
    return tmp_path / "cache"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A copy of the toy's sources, to be edited."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for path in TOY.iterdir():
        (folder / path.name).write_text(path.read_text())
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write("…", "name.h"="…"): a folder with this frame.cu and these headers."""

    def folder(main: str, **headers: str) -> Path:
        made = tmp_path / "written"
        made.mkdir(exist_ok=True)
        for name, text in {"frame.cu": main, **headers}.items():
            (made / name).write_text(text)
        return made

    return folder


def compile_toy(folder: Path = TOY, arch: str = "sm_90", **more: object) -> Cubin:
    return build.compile({**SIZES, **more}, arch, folder)


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


# -- the kernels that ship ----------------------------------------------------------------------------------------

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
"""Of an A100, A40, RTX 4090, H100, B200, RTX 5090."""

SHIPPED = [arch for _, arch, _, _ in GPUS]
EACH_TIME = {(MODELS[0], "sm_80", 8, "phase"), (MODELS[0], "sm_90", 8, "persistent")}
INSTANCES = [
    pytest.param(
        *instance,
        marks=[] if instance in EACH_TIME else pytest.mark.slow,
        id="-".join(["1.7B" if instance[0].projected else "0.6B", *map(str, instance[1:])]),
    )
    for instance in (
        *itertools.product(MODELS[:1], ARCHITECTURES, kernels.INSTANCES, launch.ENTRIES),
        *itertools.product(MODELS[1:], SHIPPED, kernels.INSTANCES, ["persistent"]),
    )
]


@pytest.mark.parametrize(("shape", "arch", "columns", "entry"), INSTANCES)
def test_the_frame_kernels_read_wide_multiply_on_tensor_cores_and_do_not_spill(
    shape: Shape, arch: str, columns: int, entry: str
) -> None:
    blocks, shared = MULTIPROCESSORS[arch], sass.SHARED[arch] * 1024
    staged = launch.staged_bytes(Gpu(0, "", (0, 0), blocks, shared, 0, True, (13, 0), ""))
    cubin = build.compile(launch.defines(shape, blocks, staged, columns, entry), arch)
    sass.assert_sound(cubin, launch.THREADS, kernels.shared_bytes(shape, columns, launch.THREADS, staged))
    kernel = sass.instructions(cubin)[entry]
    assert sass.count(kernel, "HMMA.16816.F32.BF16") > 0
    # past coherence go weights alone (their loads leave L1 out): all else may have been written by the same launch
    assert sass.count(kernel, "LDG.CONSTANT") == sass.count(kernel, "LDG.NA.128.CONSTANT") > 0
    assert sass.acquires(kernel) == sass.count(kernel, "CCTL.IVALL")
    arrivals, fences = (sass.count(kernel, name) for name in ("REDG.ADD.STRONG.GPU", "MEMBAR.GPU"))
    arrivals += sass.count(kernel, "RED.ADD.STRONG.GPU")
    # only its blocks wait for each other
    assert (sass.acquires(kernel) > 0, arrivals, fences) == ((True, 1, 1) if entry == "persistent" else (False, 0, 0))


# -- what comes out -----------------------------------------------------------------------------------------------


FAST = ("sm_80", "sm_90")


@pytest.mark.parametrize(
    "arch", [arch if arch in FAST else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES]
)
def test_a_kernel_is_made_of_the_instructions_that_its_source_asks_for(arch: str) -> None:
    cubin = compile_toy(arch=arch)
    assert (cubin.arch, cubin.origin, sorted(cubin.kernels)) == (arch, "compiled", ["clear", "steps"])
    assert cubin.kernels["steps"].shared == 128 // 32 * 4
    sass.assert_sound(cubin, threads=128, shared_bytes=128 * 16)
    steps, clear = (sass.instructions(cubin)[name] for name in ("steps", "clear"))
    assert sass.count(steps, "HMMA.16816.F32.BF16") == sass.count(steps, "LDG.128") == sass.acquires(steps) > 0
    assert sass.count(steps, "CCTL.IVALL") == sass.acquires(steps)
    assert sass.count(steps, "RED.ADD.GPU") + sass.count(steps, "REDG.ADD.GPU") == sass.acquires(steps)
    assert not any(sass.count(clear, name) for name in ("HMMA", "CCTL", "RED", "REDG"))


def test_spilled_registers_are_told_and_found_unsound() -> None:
    cubin = compile_toy(SPILL=True)
    crowded = cubin.kernels["crowded"]
    assert crowded.registers <= 65536 // (2 * 1024)  # what __launch_bounds__(1024, 2) leaves
    assert crowded.spills > 0
    assert crowded.stack > 0
    local = sass.instructions(cubin)["crowded"]
    assert sass.count(local, "STL") > 0
    assert sass.count(local, "LDL") > 0
    with pytest.raises(AssertionError, match=r"crowded spills \d+ bytes on sm_90"):
        sass.assert_sound(cubin, threads=1024, shared_bytes=0)


def test_line_numbers_are_added_on_request_and_change_no_instruction() -> None:
    plain, numbered = compile_toy(), build.compile(SIZES, "sm_90", TOY, line_info=True)
    assert (plain.origin, numbered.origin) == ("compiled", "compiled")
    assert (b".debug_line" in plain.image, b".debug_line" in numbered.image) == (False, True)
    assert sass.instructions(plain) == sass.instructions(numbered)


def test_macros_arrive_as_the_numbers_they_are(write: Callable[..., Path]) -> None:
    checks = "static_assert(COUNT == 3 && ON == 1 && OFF == 0 && SMALL == 1e-06f && sizeof(SMALL) == sizeof(float));"
    folder = write(checks + 'extern "C" __global__ void none() {}')
    defines = {"COUNT": 3, "ON": True, "OFF": False, "SMALL": 1e-6}
    assert list(build.compile(defines, "sm_80", folder).kernels) == ["none"]


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_a_gpu_gets_the_nearest_code_of_its_own_generation(capability: tuple[int, int], arch: str) -> None:
    assert build.arch_for("a GPU", capability) == arch


@pytest.mark.parametrize("capability", [(7, 5), (6, 1), (11, 0), (13, 0)])
def test_a_gpu_of_another_generation_is_named_and_left_to_torch(capability: tuple[int, int]) -> None:
    with pytest.raises(BuildError) as told:
        build.arch_for("Tesla T4", capability)
    assert str(told.value).startswith("Tesla T4 is sm_{}{}, the CUDA kernels are made for sm_80,".format(*capability))
    assert str(told.value).endswith("; use --backend torch")


# -- the cache ----------------------------------------------------------------------------------------------------


def test_what_was_compiled_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_toy()
    monkeypatch.setattr(nvrtc, "translate", None)
    second = compile_toy()
    assert (first.origin, second.origin) == ("compiled", "cached")
    assert (second.image, second.kernels, second.cuda) == (first.image, first.kernels, first.cuda)


def test_any_change_compiles_anew(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_toy(toy)
    assert compile_toy(toy, STEPS=4).origin == "compiled"
    assert compile_toy(toy, arch="sm_80").origin == "compiled"
    header = toy / "toy.h"
    header.write_text(header.read_text().replace("int(seen - all) < 0", "seen != all"))
    assert compile_toy(toy).origin == "compiled"
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 99))
    assert compile_toy(toy).origin == "compiled"
    assert len(entries(cache)) == 5


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "replaced"])
def test_a_damaged_entry_is_made_anew(damage: str, cache: Path) -> None:
    whole = compile_toy()
    (path,) = entries(cache)
    data = path.read_bytes()
    flipped = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    path.write_bytes(
        {"emptied": b"", "cut": data[:-100], "flipped": flipped, "replaced": b'text\n{"cuda": 13}'}[damage]
    )
    again = compile_toy()
    assert (again.origin, again.image) == ("compiled", whole.image)
    assert path.read_bytes() == data


def test_processes_that_compile_at_once_do_not_disturb_each_other(cache: Path) -> None:
    program = (
        "from pathlib import Path; from megakernel import build;"
        f"print(len(build.compile({SIZES!r}, 'sm_90', Path({str(TOY)!r})).image))"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sizes = {process.communicate()[0].strip() for process in running}
    assert sizes == {str(len(compile_toy().image))}
    assert len(entries(cache)) == 1
    assert compile_toy().origin == "cached"


def test_a_write_that_breaks_off_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    assert compile_toy().origin == "compiled"
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_costs_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert compile_toy().origin == "compiled"
    assert "cannot be kept" in caplog.text
    assert "PIPECAT_QWEN3_CACHE" in caplog.text


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPECAT_QWEN3_CACHE", "/mine")
    assert build.cache_folder() == Path("/mine/kernels")
    monkeypatch.delenv("PIPECAT_QWEN3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert build.cache_folder() == Path("/xdg/pipecat-qwen3/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/nobody")
    assert build.cache_folder() == Path("/nobody/.cache/pipecat-qwen3/kernels")


# -- cubins that ship with the package ----------------------------------------------------------------------------


@pytest.fixture
def shipped(toy: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(build, "CSRC", toy)
    return build.prebuild([(SIZES, "sm_90"), (SIZES, "sm_80")], build.CUBINS)


NO_NVRTC = "NVRTC is not installed: pip install nvidia-cuda-nvrtc"


def no_nvrtc() -> tuple[int, int]:
    raise BuildError(NO_NVRTC)


def test_shipped_cubins_need_no_compiler(shipped: list[Path], toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "version", no_nvrtc)
    assert [compile_toy(toy, arch).origin for arch in ("sm_90", "sm_80")] == ["prebuilt", "prebuilt"]
    with pytest.raises(BuildError) as told:
        compile_toy(toy, "sm_89")
    assert str(told.value) == f"the CUDA kernels must be compiled for sm_89, but {NO_NVRTC}"


def test_shipped_cubins_are_the_compiled_ones(shipped: list[Path], toy: Path) -> None:
    prebuilt = compile_toy(toy)
    for path in shipped:
        path.unlink()
    compiled = compile_toy(toy)
    assert (prebuilt.origin, compiled.origin) == ("prebuilt", "compiled")
    assert (prebuilt.image, prebuilt.kernels, prebuilt.cuda) == (compiled.image, compiled.kernels, compiled.cuda)


def test_the_same_sources_ship_the_same_bytes_wherever_they_are_made(
    shipped: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = build.prebuild([(SIZES, "sm_80"), (SIZES, "sm_90")], tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again} == {path.name: path.read_bytes() for path in shipped}


def test_shipped_cubins_of_other_sources_are_ignored(shipped: list[Path], toy: Path) -> None:
    (toy / "toy.h").write_text((toy / "toy.h").read_text() + "// edited\n")
    assert compile_toy(toy).origin == "compiled"


def test_shipping_removes_what_is_stale(shipped: list[Path]) -> None:
    (kept,) = build.prebuild([(SIZES, "sm_90")], build.CUBINS)
    assert kept in shipped
    assert list(build.CUBINS.iterdir()) == [kept]


def test_a_shipped_cubin_newer_than_torchs_cuda_is_left_alone(
    shipped: list[Path], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    assert compile_toy(toy).origin == "compiled"


# -- refusals, each in one line -----------------------------------------------------------------------------------


def test_an_error_in_the_source_is_told_with_file_and_line(toy: Path) -> None:
    (toy / "toy.h").write_text("struct Arguments { floot* out; };\n" + (toy / "toy.h").read_text())
    with pytest.raises(BuildError) as told:
        compile_toy(toy)
    version = "{}.{}".format(*nvrtc.version())
    first = r'toy.h(1): error: identifier "floot" is undefined'
    assert str(told.value) == f"the CUDA kernels do not compile for sm_90 with CUDA {version}: {first}"


def test_an_error_of_the_assembler_is_told_too(write: Callable[..., Path]) -> None:
    kernel = 'extern "C" __global__ void big(float* o) { __shared__ float x[90000]; x[threadIdx.x] = *o; *o = x[7]; }'
    with pytest.raises(BuildError, match=r"ptxas error .*'big' uses too much shared data"):
        build.compile({}, "sm_90", write(kernel))


@pytest.mark.parametrize("header", ["cuda_bf16.h", "cuda_runtime.h", "cstdint", "elsewhere.h"])
def test_no_header_but_our_own_is_found(
    header: str, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere.h").write_text("")
    monkeypatch.chdir(tmp_path)  # the working folder is not searched either
    with pytest.raises(BuildError, match=rf'could not open source file "{header}"'):
        build.compile({}, "sm_90", write(f'#include "{header}"\n'))


def test_an_architecture_that_the_compiler_does_not_know_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(BuildError, match=r"do not compile for sm_10 with CUDA .*: .*--gpu-architecture"):
        build.compile({}, "sm_10", write(""))


def test_without_the_bindings_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BuildError, match="but cuda-bindings is not installed: pip install cuda-bindings"):
        compile_toy()


def test_without_the_library_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so.13"')  # what cuda-bindings raises

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", missing)
    with pytest.raises(BuildError) as told:
        compile_toy()
    assert str(told.value) == f"the CUDA kernels must be compiled for sm_90, but {NO_NVRTC}"
