"""Settings and the checkpoint that they name: whether the one can be served with the other."""

from pathlib import Path

from ...engine.errors import CheckpointError, ConfigurationError
from ...engine.model.config import ModelConfig
from ...engine.prefill.budgets import BUDGETS_FILE, dense_up_to, has_budgets
from .parts import GangSettings
from .reading import Settings, read_settings
from .sections import DecodeSettings


def load_settings(path: Path) -> Settings:
    """Read and check a configuration, the checkpoint's own limits included.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or describes what cannot run.
        CheckpointError: the model's folder cannot be served.
    """
    settings = read_settings(path)
    check_model(settings)
    return settings


def check_model(settings: Settings) -> None:
    """Refuse settings that this checkpoint cannot be served with.

    Raises:
        ConfigurationError: a length beyond the model's, a mesh that does not divide it, or sparse
            prefill that is asked for by name where the checkpoint has no budgets for it.
        CheckpointError: the folder cannot be read, or has tokens that the model has no row for.
    """
    # With what it needs, it takes longer to import than the rest of reading a configuration.
    from ...engine.text.tokenizer import Tokenizer

    model = ModelConfig.from_folder(settings.model.folder)
    if settings.limits.max_model_len > model.max_position_embeddings:
        raise ConfigurationError(
            f"limits.max_model_len ({settings.limits.max_model_len}) is beyond the "
            f"{model.max_position_embeddings} positions of {settings.model.folder}; lower it"
        )
    check_decode_ranks(settings.decode, model)
    if settings.decode.engine == "vllm" and model.dual_chunk is None:
        raise ConfigurationError(
            f"decode.engine vllm is for models with a dual_chunk_attention_config, and "
            f"{settings.model.folder} has none; set decode.engine: native"
        )
    for gang in settings.gangs:
        model.check_tensor_parallel(gang.prefill.tensor_parallel)
        missing = _missing_budgets(gang)
        if missing is not None and "sparse" in gang.prefill.model_fields_set:
            raise ConfigurationError(missing)
    # One such token in a prompt would end a whole gang.
    tokens = Tokenizer(settings.model.files.tokenizer_folder).vocab_size
    if tokens > model.vocab_size:
        raise CheckpointError(
            f"{settings.model.folder}: its tokenizer has ids up to {tokens - 1} and its embedding "
            f"only {model.vocab_size} rows; resize the embedding, or remove the added tokens"
        )


def check_decode_ranks(decode: DecodeSettings, model: ModelConfig) -> None:
    """Refuse a number of ranks of a decode worker that a model cannot be cut into.

    Raises:
        ConfigurationError: it does not divide the KV heads, which are not held twice, or the MLP.
    """
    heads, middle = model.num_kv_heads, model.intermediate_size
    if heads % decode.tensor_parallel or middle % decode.tensor_parallel:
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and middle % n == 0]
        raise ConfigurationError(
            f"decode.tensor_parallel ({decode.tensor_parallel}) does not divide this model's "
            f"{heads} KV heads and MLP of {middle}; make it one of {', '.join(map(str, possible))}"
        )


def warnings_about(settings: Settings) -> list[str]:
    """What would run otherwise than its defaults say; for settings that `check_model` let through.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    missing = (_missing_budgets(gang) for gang in settings.gangs)
    return [each for each in missing if each is not None]


def _missing_budgets(gang: GangSettings) -> str | None:
    """What to say where long prompts would be prefilled densely and are meant not to be."""
    folder = gang.model.folder
    if not gang.prefill.sparse or has_budgets(folder):
        return None
    threshold = dense_up_to(folder)
    if gang.max_prompt_tokens <= threshold:
        return None
    return (
        f"{gang.prefill.key('sparse')} is true and {folder} has no {BUDGETS_FILE}, so prompts of "
        f"more than {threshold:,} tokens would be prefilled densely, which takes about ten times "
        "as long at a million; make the file with `longreach eval calibrate`, or set "
        "prefill.sparse: false if dense is what you want"
    )
