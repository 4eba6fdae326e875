"""Options that several commands share: the model, its policy, and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyramidinfer.cli.common import BACKENDS, DEFAULT_POLICY, POLICY_NAMES, policy_from
from pyramidinfer.options import Option, at_least, check_options, json_object
from pyramidinfer.server.settings import GenerationConfig

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from pyramidinfer.policies import Policy

__all__ = [
    "AsJson",
    "DemoOptions",
    "DoctorOptions",
    "InspectOptions",
    "ModelOptions",
    "ProfileOptions",
    "PromptOptions",
    "SamplingOptions",
    "VerifyOptions",
]


AsJson = Annotated[bool, Option("Print one JSON object.", flags=("--json",))]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, its policy, and the hardware it runs on."""

    model: Annotated[
        str | None,
        Option(
            "Model folder, Hugging Face hub id, name of a fetched model, or GGUF file.",
            unset="the shipped model",
            positional=True,
            see="models.md",
        ),
    ] = None
    policy: Annotated[
        str,
        Option(
            f"Compression method; full keeps the whole cache. One of: {', '.join(POLICY_NAMES)}.",
            see="choosing.md",
        ),
    ] = DEFAULT_POLICY
    keep: Annotated[
        float | None,
        Option(
            "Share of the prompt's KV cache to keep, in (0, 1], mean over layers. With a lower "
            "share "
            "more requests fit into memory, and answers lose accuracy.",
            unset="0.5 for pyramid and duo, the published budget for other policies",
        ),
    ] = None
    option: Annotated[
        tuple[str, ...],
        Option(
            "An option of the policy: NAME=VALUE. May be repeated.",
            flags=("--option", "-o"),
            repeat=True,
            see="methods.md",
        ),
    ] = ()
    lossless: Annotated[
        bool,
        Option(
            "Speculative decoding that gives exactly the answers of policy full. The whole cache "
            "is "
            "kept; --policy and --keep (0.1 for pyramid) choose the entries that are read to draft "
            "tokens.",
            see="lossless.md",
        ),
    ] = False
    dtype: Annotated[
        str,
        Option(
            "Data type of weights and computation: auto (the checkpoint's), float32, bfloat16, "
            "float16 or float64."
        ),
    ] = "auto"
    device: Annotated[
        str, Option("auto (a GPU if there is one), cpu or cuda; cuda fails without a GPU.")
    ] = "auto"
    backend: Annotated[
        str,
        Option(
            f"Attention kernels: auto (the fastest available), {', '.join(BACKENDS)}. cpu (C++) "
            f"needs a compiler; reference is plain torch, and slow."
        ),
    ] = "auto"
    threads: Annotated[
        int,
        Option(
            "CPU threads; 0 lets torch choose the number. In a container, set it to the CPU limit. "
            "The variable OMP_NUM_THREADS does the same.",
            check=at_least(0),
        ),
    ] = 0

    def __post_init__(self) -> None:
        check_options(self)

    def set_threads(self) -> None:
        """Set torch's number of threads."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)

    @property
    def chosen(self) -> Policy:
        """The policy object; ``ValueError`` for options it does not have."""
        return policy_from(self.policy, self.keep, list(self.option), self.lossless)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling; None takes the model's generation config, else greedy."""

    max_tokens: Annotated[
        int | None,
        Option(
            "Maximum number of generated tokens.",
            unset="the model's max_new_tokens, else 256 in a chat and 64 otherwise",
        ),
    ] = None
    temperature: Annotated[
        float | None, Option("Sampling temperature; 0 is greedy.", unset="the model's, or 0")
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            "Sample only from the likeliest tokens that together have this probability; 1 is off.",
            unset="the model's, or off",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Option(
            "Sample only from this many of the likeliest tokens; 0 is off.",
            unset="the model's, or off",
        ),
    ] = None
    seed: Annotated[int | None, Option("Random seed, to make sampling repeatable.")] = None
    stop: Annotated[
        tuple[str, ...], Option("A text that ends the answer. May be repeated.", repeat=True)
    ] = ()
    generation_config: GenerationConfig = "auto"
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Option(
            'Keyword arguments of the chat template, a JSON object such as {"enable_thinking": '
            "false}.",
            unset="none",
            parse=json_object,
        ),
    ] = None

    @property
    def asked(self) -> dict[str, Any]:
        """Fields of ``SamplingParams`` that were given."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        given = {name: getattr(self, name) for name in names}
        given["stop"] = list(self.stop) or None
        return {name: value for name, value in given.items() if value is not None}


Lora = Annotated[
    str | None,
    Option("Name of an adapter of --lora-modules to answer with.", unset="the model alone"),
]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompt of ``generate``, and the form of its answer."""

    prompt: Annotated[str | None, Option("The prompt.")] = None
    prompt_file: Annotated[Path | None, Option("File with the prompt; - is standard input.")] = None
    chat: Annotated[bool, Option("Apply the model's chat template.")] = False
    lora: Lora = None
    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Questions and memory of the demo; None is a value that suits the model."""

    fetch: Annotated[
        str | None,
        Option("Download this model and run on it; if that fails, on the shipped one."),
    ] = None
    documents: Annotated[
        int | None,
        Option("Number of documents, each with one question.", unset="24, or 15 for --fetch"),
    ] = None
    length: Annotated[
        int | None, Option("Tokens of each document.", unset="2000, or 1500 for --fetch")
    ] = None
    kv_memory: Annotated[
        str | None, Option("Memory for the KV caches.", unset="64MiB, or 256MiB for --fetch")
    ] = None
    keep: Annotated[
        float | None, Option("Share of the cache to keep.", unset="0.3, or 0.25 for --fetch")
    ] = None
    out: Annotated[Path, Option("Folder for the picture and the results.")] = Path("out")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The request whose memory is computed."""

    prompt_len: Annotated[int, Option("Tokens of the prompt.", check=at_least(1))] = 2048
    max_tokens: Annotated[int, Option("Maximum number of generated tokens.", check=at_least(1))] = (
        256
    )
    as_json: AsJson = False

    def __post_init__(self) -> None:
        check_options(self, as_flags=True)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """How the report is printed."""

    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Output of a profile."""

    output: Annotated[
        Path | None,
        Option(
            "File for the profile.", unset="in the user's cache folder", flags=("--output", "-o")
        ),
    ] = None
    picture: Annotated[
        Path | None, Option("PNG file for a picture of layers and heads.", unset="none")
    ] = None
    force: Annotated[bool, Option("Measure again, even if a profile is stored.")] = False
    quick: Annotated[bool, Option("Measure on a third of the texts: faster, less exact.")] = False
    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The limit that a setting must reach, and the file for the result."""

    floor: Annotated[
        float | None,
        Option("Share of the full cache's quality that the policy must keep.", unset="0.8"),
    ] = None
    json: Annotated[Path | None, Option("File for the result.", unset="none")] = None
