"""The page: its components, and what happens when they are used."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from modelscope_dolly.engine.engine import SLOTS
from modelscope_dolly.errors import DollyError
from modelscope_dolly.generation import GenerationSettings, TextGenerator
from modelscope_dolly.web.progress import ask, explain, settings_of, status
from modelscope_dolly.web.words import EXAMPLES, LANGUAGES, WORDS, preferred_language

#: Questions that may wait for a free slot; whoever comes after them is told that the queue is full.
QUEUE = 128
#: Language that the page is sent in, before it is known what the reader's is.
START = "en"
_DEFAULTS = GenerationSettings()
#: Name of a setting -> component and what it starts with.
SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "max_new_tokens": (gr.Slider, dict(value=_DEFAULTS.max_new_tokens, minimum=1, maximum=1024, step=1)),
    "do_sample": (gr.Checkbox, dict(value=_DEFAULTS.do_sample)),
    "temperature": (gr.Slider, dict(value=_DEFAULTS.temperature, minimum=0.05, maximum=2, step=0.05)),
    "top_p": (gr.Slider, dict(value=_DEFAULTS.top_p, minimum=0.01, maximum=1, step=0.01)),
    "top_k": (gr.Number, dict(value=_DEFAULTS.top_k, precision=0, minimum=0)),
    "seed": (gr.Textbox, dict(lines=1, max_lines=1)),  # an empty gr.Number is shown as 0
    "repetition_penalty": (gr.Slider, dict(value=_DEFAULTS.repetition_penalty, minimum=1, maximum=2, step=0.05)),
    "stop_texts": (gr.Textbox, dict(lines=2, max_lines=6)),
    "truncate_context": (gr.Checkbox, dict(value=False)),
}
#: Fonts of the reader's system: no page of this package asks another host for anything.
FONTS = ["system-ui", "-apple-system", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
#title { flex: 1 1 0; min-width: 5rem; font-size: var(--text-xxl); font-weight: 600; }
#language { flex: 0 0 auto; width: max-content !important; min-width: 0 !important; }
#language { overflow: visible; border: 0; background: none; padding: 0; }
#language .wrap { justify-content: flex-end; flex-wrap: nowrap; }
#language label { white-space: nowrap; }
#heading { flex-wrap: nowrap; align-items: center; }
#fields .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
#fields .form > * { min-width: 0 !important; }
#title .html-container, #status .html-container { padding: 0; }
#status { font-size: var(--text-sm); min-height: 2.5em; }
#status .failed { color: var(--error-text-color); }
footer { display: none !important; }
"""
#: Small print that can be read; gradio's own is lighter.
SUBDUED = {"body_text_color_subdued": "*neutral_500", "block_info_text_color": "*neutral_500"}
SUBDUED |= {f"{name}_dark": "*neutral_400" for name in list(SUBDUED)}
_SET_LANGUAGE = "(language) => { document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en'; }"


class Ticket:
    """By which a visitor's buttons reach the answer that is being made.

    gradio's own `cancels` closes the generator, but what it sent last may arrive after what the button shows instead.
    """

    def __init__(self):
        self.stopped = self.cleared = False

    def stop(self) -> None:
        self.stopped = True

    def clear(self) -> None:
        self.stopped = self.cleared = True


class Labels:
    """Makes components with texts of WORDS, and remembers which, so that they can change their language."""

    def __init__(self, window: int):
        self.window = window
        self._keys: dict[Any, dict[str, str]] = {}

    def component(self, kind: type, keys: dict[str, str], **fixed: Any) -> Any:
        """A component; `keys` says which of its properties hold which text."""
        made = kind(**self._texts(keys, START), **fixed)
        self._keys[made] = keys
        return made

    @property
    def components(self) -> list[Any]:
        return list(self._keys)

    def updates(self, language: str) -> list[dict]:
        """For `components`: the same in another language."""
        return [gr.update(**self._texts(keys, language)) for keys in self._keys.values()]

    def _texts(self, keys: dict[str, str], language: str) -> dict[str, str]:
        return {name: WORDS[language][key].format(window=self.window) for name, key in keys.items()}


def theme() -> gr.themes.Base:
    """gradio's default, with the fonts of the reader's system."""
    return gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]).set(**SUBDUED)


def build(text_generator: TextGenerator) -> gr.Blocks:
    """The page for one loaded model. All users share its engine."""
    labels = Labels(text_generator.engine.window)
    make = labels.component
    with gr.Blocks(title="dolly", analytics_enabled=False) as page:
        with gr.Row(elem_id="heading"):
            gr.HTML("<h1>dolly</h1>", elem_id="title")
            language = gr.Radio(
                [(shown, code) for code, shown in LANGUAGES.items()], value=START, container=False, elem_id="language"
            )
        make(gr.Markdown, {"value": "intro"})
        instruction = make(
            gr.Textbox, {"label": "instruction", "placeholder": "instruction_hint"}, lines=3, max_lines=12,
            elem_id="instruction", autofocus=True,
        )  # fmt: skip
        context = make(
            gr.Textbox, {"label": "context", "placeholder": "context_hint"}, lines=2, max_lines=12, elem_id="context"
        )
        with gr.Row():
            start = make(gr.Button, {"value": "ask"}, variant="primary", elem_id="ask", min_width=80)
            stop = make(gr.Button, {"value": "stop"}, variant="stop", interactive=False, elem_id="stop", min_width=80)
            clear = make(gr.Button, {"value": "clear"}, elem_id="clear", min_width=80)
        answer = make(
            gr.Textbox, {"label": "answer"}, lines=6, max_lines=24, interactive=False, buttons=["copy"],
            elem_id="answer",
        )  # fmt: skip
        told = gr.HTML(elem_id="status")
        examples = gr.Dataset(
            label=WORDS[START]["examples"], components=[gr.Textbox(visible=False), gr.Textbox(visible=False)],
            samples=[[question, text] for _, _, question, text in EXAMPLES], layout="gallery", type="index",
            sample_labels=example_labels(START), elem_id="examples",
        )  # fmt: skip
        with make(gr.Accordion, {"label": "settings"}, open=False, elem_id="settings"), gr.Row(elem_id="fields"):
            fields = {
                name: make(kind, {"label": name, "info": f"{name}_info"}, elem_id=name, **fixed)
                for name, (kind, fixed) in SETTINGS.items()
            }
        with make(gr.Accordion, {"label": "limits"}, open=False, elem_id="limits"):
            make(gr.Markdown, {"value": "limits_text"})
        ticket = gr.State(Ticket())

        quick = dict(queue=False, show_progress="hidden", api_visibility="private")
        shown = [answer, told, start, stop]
        begun = gr.on([start.click, instruction.submit, context.submit], _begin, language, [ticket, *shown], **quick)
        begun.then(
            partial(_run, text_generator), [ticket, instruction, context, language, *fields.values()], shown,
            show_progress="minimal", show_progress_on=told, api_visibility="private",
            concurrency_id="engine", concurrency_limit=text_generator.engine.slots or SLOTS,
        )  # fmt: skip
        stop.click(Ticket.stop, ticket, None, **quick)
        clear.click(_cleared, ticket, [instruction, context, *shown], **quick)
        examples.click(lambda index: EXAMPLES[index][2:], examples, [instruction, context], **quick)

        def in_language(code: str) -> list:
            return [*labels.updates(code), gr.update(label=WORDS[code]["examples"], sample_labels=example_labels(code))]

        def at_first(request: gr.Request) -> list:
            code = preferred_language(request.headers.get("accept-language"))
            if code == START:  # nothing to change, and perhaps the reader has switched already
                return [gr.skip()] * (1 + len(changed))
            return [code, *in_language(code)]

        changed = [*labels.components, examples]
        language.input(in_language, language, changed, **quick)
        language.change(None, language, None, js=_SET_LANGUAGE)
        page.load(at_first, None, [language, *changed], **quick)
        gr.api(_api(text_generator), api_name="ask", concurrency_id="engine")
    return page.queue(api_open=False, max_size=QUEUE)


def example_labels(language: str) -> list[str]:
    """What the buttons of the examples say."""
    kind = list(LANGUAGES).index(language)
    return [f"{example[kind]}: {example[2]}" for example in EXAMPLES]


def _idle() -> list:
    """The buttons that ask and stop, where nothing is being answered."""
    return [gr.update(interactive=True), gr.update(interactive=False)]


def _begin(language: str) -> list:
    """The page as it is while an answer is made."""
    told = html.escape(WORDS[language]["waiting"])
    return [Ticket(), "", told, gr.update(interactive=False), gr.update(interactive=True)]


def _run(
    text_generator: TextGenerator, ticket: Ticket, instruction: str, context: str, language: str, *values: Any
) -> Iterator[list]:
    """The page while the answer grows. gradio closes this generator when its reader leaves."""
    words, progress = WORDS[language], None
    try:
        settings = settings_of(dict(zip(SETTINGS, values, strict=True)))
        for progress in ask(text_generator, instruction, context, settings):
            if ticket.stopped and not progress.ended:
                break
            buttons = _idle() if progress.ended else [gr.skip(), gr.skip()]
            yield [progress.text, html.escape(status(progress, words)), *buttons]
    except DollyError as error:
        message = html.escape(explain(error, text_generator, instruction, context, words))
        yield [gr.skip(), f'<span class="failed" role="alert">{message}</span>', *_idle()]
        return
    if ticket.cleared:
        yield ["", "", *_idle()]
    elif not progress.ended:
        yield [progress.text, html.escape(status(progress, words, cancelled=True)), *_idle()]


def _cleared(ticket: Ticket) -> list:
    ticket.clear()
    return ["", "", "", "", *_idle()]


def _api(text_generator: TextGenerator):
    def ask_dolly(
        instruction: str,
        context: str = "",
        max_new_tokens: int = _DEFAULTS.max_new_tokens,
        do_sample: bool = _DEFAULTS.do_sample,
        seed: int | None = None,
    ) -> dict:
        """Ask dolly, an instruction-following model, one question. It remembers nothing of earlier ones.

        Args:
            instruction: a question or a task, in English
            context: text that the instruction is about, if any
            max_new_tokens: longest answer in tokens
            do_sample: draw at random; false takes the likeliest token each time
            seed: whole number that makes a random answer repeatable

        Returns:
            text, finish_reason (stop or length), new_tokens, prompt_tokens, seed
        """
        form = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "seed": seed}
        try:
            for progress in ask(text_generator, instruction, context, settings_of(form)):
                last = progress
        except DollyError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {
            "text": last.text,
            "finish_reason": last.ended,
            "new_tokens": last.new_tokens,
            "prompt_tokens": last.prompt_tokens,
            "seed": last.seed,
        }

    return ask_dolly
