"""Step 4: `python -m common.chat` talks to an exported model, or answers a file of prompts."""

import argparse
from pathlib import Path

from common import errors, log
from common.chat.answers import answer_all
from common.chat.settings import ChatSettings
from common.chat.terminal import Terminal
from common.inference.generation import Generator
from common.inference.model import find_device
from common.inference.model_folder import open_model_folder
from common.inference.output import check_new_file
from common.inference.prompt_rows import PromptReader
from common.inference.prompts import PromptEncoder, find_template
from common.inference.sampling import effective_sampling
from common.log import logger
from common.settings import add_options, check_environment, from_namespace


def chat(settings: ChatSettings, check: bool) -> None:
    """Answers PROMPTS, or what is typed; `check`: only check that it can be done."""
    folder = open_model_folder(Path(settings.hf_model_path))
    find_device(settings.device)
    sampling = effective_sampling(settings, folder.generation)
    template = find_template(folder.tokenizer, settings.mode)
    encoder = PromptEncoder(folder.tokenizer, template, folder.room(settings.max_new_tokens))
    reader = PromptReader(
        encoder, settings.mode, settings.system or "", settings.roles, settings.chat_template_kwargs or ""
    )
    output = Path(settings.output) if settings.output else None
    if output:
        check_new_file(output)
    prompts = reader.read(Path(settings.prompts)) if settings.prompts else []
    if check:
        print(f"ok: {folder.path} can answer {f'{len(prompts)} prompts' if prompts else 'what you type'}")
        return
    if prompts:
        logger.info("%d prompts of %d to %d tokens", len(prompts), *_bounds([len(each.ids) for each in prompts]))
    generator = Generator(folder, settings, sampling, settings.max_new_tokens, settings.seed)
    if prompts:
        answer_all(generator, prompts, settings.batch_size, output)
    else:
        Terminal(generator, reader).run()


def _bounds(numbers: list[int]) -> tuple[int, int]:
    return min(numbers), max(numbers)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m common.chat", description=ChatSettings.__doc__)
    add_options(parser, ChatSettings)
    parser.add_argument("--check", action="store_true", help="check the model and the prompts, and stop")
    arguments = parser.parse_args()
    log.setup()
    log.quiet_libraries()
    settings = from_namespace(ChatSettings, arguments)
    check_environment(settings)
    chat(settings, arguments.check)


if __name__ == "__main__":
    errors.run(main)
