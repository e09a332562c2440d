"""The plugins' host code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: ``plugins/testing/fuzz_plugins``
makes TensorRT's calls with right and wrong arguments, from one thread and from several. Nothing of it needs a GPU, Triton,
or the installed library. Faults put into copies of the sources show that it can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from library_support import PLUGINS, compile_objects

ADDRESS, THREAD = "address,undefined", "thread"
FUZZ = ("--seed", "1", "--count", "20000")
THREADS = ("--threads", "4", "--count", "200")
PROFILES = ("--seed", "1", "--profiles", "5000")
RUNS = {
    "fuzz": (ADDRESS, FUZZ), "profiles": (ADDRESS, PROFILES), "threads": (THREAD, THREADS),
    "threads without races": (ADDRESS, THREADS),
}  # fmt: skip
MINIMUM = {"plugins": 10000, "refusals": 20000, "runs": 4000, "launches": 4000}
"""Of the fuzz run: a generator whose inputs are all refused at once finds nothing."""

GENERATE = """
import hashlib, sys
from pathlib import Path
from kernels import compile as compiler
from kernels.table import KERNELS, variants

folder = Path(sys.argv[1])
(folder / "images").mkdir(parents=True)
images = []
for chip, ptx in ((80, False), (80, True), (89, False)):
    for index, variant in enumerate(variants()):
        file = f"{variant.name}_{'compute' if ptx else 'sm'}{chip}"
        content = f"// in the place of {file}\\0".encode()
        (folder / "images" / file).write_bytes(content)
        shared = (0, 1024, 48 * 1024, 48 * 1024 + 16, 96 * 1024)[index % 5]  # some have to be asked for
        digest = hashlib.sha256(content).hexdigest()
        images.append(
            compiler.Image(variant, chip, ptx, variant.kernel, file, digest, len(content), shared, variant.num_warps, 0, 0)
        )
kinds = {"int32": "i", "float32": "f"}
rows = [
    f'    {{"{kernel.name}", "{"".join(kinds.get(kind, "p") for _, kind in kernel.arguments)}", '
    f'{{{", ".join(chr(34) + name + chr(34) for name, _ in kernel.arguments)}}}}},'
    for kernel in KERNELS.values()
]
signatures = [
    "#pragma once", "namespace llama_export::kernels", "{",
    "struct KernelSignature", "{", "    char const* kernel;", "    char const* kinds; //!< p pointer, i int32, f float32",
    "    char const* names[32];", "};",
    "inline constexpr KernelSignature kSignatures[] = {", *rows, "};", "} // namespace llama_export::kernels", "",
]
(folder / "kernel_arguments.h").write_text(compiler.arguments_header())
(folder / "kernel_table.h").write_text(compiler.table_header(images))
(folder / "kernel_images.S").write_text(compiler.assembly(images, folder / "images"))
(folder / "kernel_signatures.h").write_text("\\n".join(signatures))
"""
"""What kernels/compile.py generates, of the table in this tree, with a line of text in the place of each kernel's code."""

PROBES = {
    ADDRESS: "int main(int count, char**) { char* one = new char[1]; volatile char got = one[count - 1]; delete[] one; return got * 0; }",
    THREAD: """
#include <thread>
int shared;
int main(int count, char**)
{
    std::thread other([&] { shared += count > 1; });
    if (count > 1) { ++shared; }
    other.join();
}""",
}
"""A fault where there is an argument, none where there is none."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong line, the run that has to find it, and what that says."""

    name: str
    file: str
    text: str
    fault: str
    says: str
    run: str = "fuzz"
    is_slow: bool = False


FAULTS = (
    Fault("value of an empty field read", "fields.cpp", "found->data == nullptr || found->length != 1)", "found->data == nullptr)", "heap-buffer-overflow"),
    Fault("nine dimensions read", "shapes.cpp", "i < dims.nbDims && i < Dims::MAX_DIMS;", "i < dims.nbDims;", "runtime error|AddressSanitizer"),
    Fault("sentence copied past its buffer", "log.cpp", 'static_cast<size_t>(size), "%s", gLatest)', 'sizeof gLatest, "%s", gLatest)', "heap-buffer-overflow"),
    Fault("clone points at its origin", "plugin_base.h", "        made->describeFields();\n", "", "heap-use-after-free"),
    Fault("product of dimensions unchecked", "shapes.cpp", "if (__builtin_mul_overflow(product, size, &product))", "if ((product *= size) < 0)", "signed integer overflow"),
    Fault("workspace of unchecked sizes", "masked_attention_plugin.cpp", "!checkLargestQuery(kNAME, mParameters, query, query.d[1])", "!checkRank(kNAME, \"query\", query, 3) || !checkKnown(kNAME, &query, 1)", "signed integer overflow"),
    Fault("unknown sizes run", "shapes.cpp", "if (dims.d[axis] < 0)", "if (dims.d[axis] < -1)", "accepted, expected a refusal"),
    Fault("refusal without a sentence", "attention_parameters.cpp", "    reportError(plugin, \"no kernel serves this head_dim", "    if (parameters.head_dim > 0) return false;\n    reportError(plugin, \"no kernel serves this head_dim", "left no sentence"),
    Fault("kernels of a destroyed context", "kernel_cache.cpp", " && entry->key.id == key.id", "", "not loaded in"),
    Fault("engine of another ABI accepted", "fields.cpp", "if (mIsGood && abi != kABI)", "if (mIsGood && abi < 0)", "accepted, expected a refusal"),
    Fault("workspace of the largest cache alone", "attention_plugin.cpp", "splits = mostSplits(largest.capacity);", "splits = numSplits(largest.capacity);", "the workspace is too small", "profiles"),
    Fault("workspace of fewer pieces than are run", "attention_plugin.cpp", "return {mParameters, sizes, splitTokens, numSplits(sizes.capacity), elementSize(type)};", "return {mParameters, sizes, splitTokens, numSplits(sizes.capacity) - 1, elementSize(type)};", "lie in no tensor|overlaps another", "profiles"),
    Fault("workspace not compared", "attention_parameters.cpp", "if (needed <= std::max<int64_t>(0, granted))", "if (needed >= 0)", "lie in no tensor|accepted, expected a refusal", "profiles"),
    Fault("workspace not compared when shapes change", "attention_plugin.cpp", "\n        && checkWorkspace(workspaceOf(sizesOf(dims[kQUERY], dims[kPAST_KEY]), in[kQUERY].type).bytes);", ";", "refused, expected to be accepted|accepted, expected a refusal", "fuzz", is_slow=True),
    Fault("workspace not compared before a launch", "attention_plugin.cpp", " || !checkWorkspace(parts.bytes)\n", "\n", "lie in no tensor|accepted, expected a refusal", "profiles"),
    Fault("masked: workspace not compared before a launch", "masked_attention_plugin.cpp", "    if (!checkWorkspace(parts.bytes))\n    {\n        return kFAILURE;\n    }\n", "", "lie in no tensor|accepted, expected a refusal", "profiles", is_slow=True),
    Fault("clone keeps its origin's kernels", "plugin_base.h", "        made->mIsReady = false; // the kernels are those of the context that the origin was attached to\n", "", "none of the current context", "profiles", is_slow=True),
    Fault("sentence taken without its mutex", "log.cpp", "    std::lock_guard<std::mutex> const lock(gLatestMutex);\n    int32_t", "    int32_t", "data race", "threads"),
    Fault("kernels cached without their mutex", "kernel_cache.cpp", "    std::lock_guard<std::mutex> const lock(gLoadedMutex);\n", "", "data race|is loaded twice", "threads"),
    Fault("driver opened without its mutex", "cuda_driver.cpp", "    std::lock_guard<std::mutex> const lock(mutex);\n", "", "data race", "threads"),
    Fault("fields written when they are asked for", "plugin_base.h", "        return &mFieldCollection;\n    }\n\n    //! What", "        describeFields();\n        return &mFieldCollection;\n    }\n\n    //! What", "data race", "threads"),
)  # fmt: skip


def options(sanitizers: str) -> list[str]:
    """Of the compiler and the linker."""
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with the sanitizers' own settings."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SAN_OPTIONS")}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, env=environment)


def require_sanitizers(sanitizers: str, folder: Path) -> None:
    """Skips where g++ does not have them, or where they do not work: a fault has to be found, no fault must not."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text(PROBES[sanitizers], encoding="utf-8")
    command = ["g++", "-std=c++17", "-pthread", *options(sanitizers), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip(f"g++ cannot build with -fsanitize={sanitizers}: {built.stderr.strip().splitlines()[-1]}")
    right, wrong = run_program(program), run_program(program, "a fault")
    if right.returncode != 0 or wrong.returncode == 0:
        said = (right.stderr.strip() or "it finds nothing").splitlines()[0]
        pytest.skip(f"programs with -fsanitize={sanitizers} do not work here: {said}")


@dataclass(frozen=True, slots=True)
class Build:
    """The program of the unchanged sources, and its objects for the changed ones."""

    sanitizers: str
    generated: Path
    objects: Mapping[str, Path]
    program: Path


def compile_sanitized(
    sanitizers: str, sources: Sequence[Path], headers: Path, generated: Path, folder: Path
) -> dict[str, Path]:
    """File name -> object."""
    objects = compile_objects(
        sources, generated, folder, [*options(sanitizers), f"-I{headers}", f"-I{PLUGINS / 'testing'}"]
    )
    return {path.name: item for path, item in zip(sources, objects, strict=True)}


def link_program(sanitizers: str, objects: Mapping[str, Path], folder: Path) -> Path:
    """The plugins, the driver and the generator of inputs in one program, in which dlopen() finds the driver."""
    program = folder / "fuzz_plugins"
    command = [
        "g++",
        *options(sanitizers),
        *map(str, objects.values()),
        "-rdynamic",
        "-ldl",
        "-pthread",
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program


class Builds:
    """Builds of the unchanged sources, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Build] = {}

    def of(self, sanitizers: str) -> Build:
        """Skips where the sanitizers do not work."""
        if sanitizers not in self._made:
            folder = self._folder / sanitizers.replace(",", "-")
            folder.mkdir()
            require_sanitizers(sanitizers, folder)
            generated = folder / "generated"
            subprocess.run([sys.executable, "-B", "-c", GENERATE, generated], cwd=PLUGINS, check=True)
            sources = [
                *sorted((PLUGINS / "src").glob("*.cpp")),
                *sorted((PLUGINS / "testing").glob("*.cpp")),
                generated / "kernel_images.S",
            ]
            objects = compile_sanitized(sanitizers, sources, PLUGINS / "src", generated, folder / "objects")
            self._made[sanitizers] = Build(sanitizers, generated, objects, link_program(sanitizers, objects, folder))
        return self._made[sanitizers]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("sanitized"))


def faulty_program(build: Build, fault: Fault, folder: Path) -> Path:
    """The program with one edit. Everything that may include an edited header is compiled again."""
    source = folder / "src"
    shutil.copytree(PLUGINS / "src", source)
    text = (source / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.text) == 1, f"{fault.file} holds {text.count(fault.text)} times: {fault.text}"
    (source / fault.file).write_text(text.replace(fault.text, fault.fault), encoding="utf-8")
    changed = sorted(source.glob("*.cpp")) if fault.file.endswith(".h") else [source / fault.file]
    objects = compile_sanitized(build.sanitizers, changed, source, build.generated, folder / "objects")
    return link_program(build.sanitizers, {**build.objects, **objects}, folder)


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_found(builds: Builds, run: str) -> None:
    sanitizers, arguments = RUNS[run]
    result = run_program(builds.of(sanitizers).program, *arguments)
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    if run == "fuzz":
        words = result.stdout.replace(",", "").replace("kernel ", "").split(": ")[1].split()
        counts = {name: int(number) for number, name in zip(words[::2], words[1::2], strict=True)}
        assert counts.keys() == MINIMUM.keys()
        assert all(counts[name] >= least for name, least in MINIMUM.items()), result.stdout


@pytest.mark.slow
def test_a_hundred_thousand_sequences_of_shapes_stay_in_their_memory(builds: Builds) -> None:
    """Random shapes within and beyond the profile of one plugin, for all four: no byte outside its workspace and tensors."""
    result = run_program(builds.of(ADDRESS).program, "--seed", "2", "--profiles", "100000")
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    found = re.match(
        r"100000 sequences of seed 2: (\d+) shapes, (\d+) beyond, (\d+) refused, (\d+) clones", result.stdout
    )
    assert found is not None, result.stdout
    shapes, beyond, refused, clones = map(int, found.groups())
    assert shapes > 300_000
    assert clones > 50_000
    assert 0 < refused < beyond


def test_an_input_is_the_same_alone(builds: Builds) -> None:
    program = builds.of(ADDRESS).program
    first, again = (run_program(program, "--seed", "3", "--first", "1000", "--count", "50") for _ in range(2))
    assert (first.returncode, first.stdout) == (0, again.stdout)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] * fault.is_slow) for fault in FAULTS],
)
def test_fault_is_found(builds: Builds, fault: Fault, tmp_path: Path) -> None:
    sanitizers, arguments = RUNS[fault.run]
    result = run_program(faulty_program(builds.of(sanitizers), fault, tmp_path), *arguments)
    assert result.returncode != 0, "not found"
    assert any(words in result.stderr for words in fault.says.split("|")), result.stderr[-4000:]
