"""The page: talk to a model about pictures, compare it with another, look inside, and watch what is trained.

    python demo/app.py [--model-path runs/tiny/final] [--adapter DIR] [--compare 4bit|8bit|MODEL] [--load-4bit]

Then open http://127.0.0.1:7860. Programs find an OpenAI-compatible API below /v1 there. Nothing is loaded from the
web, and nothing is told to anybody.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # of a statistic that nobody sees, made anew after every event
UPLOADS = tempfile.TemporaryDirectory(prefix="plain-llava-")  # only this user's, and gone with the process
os.environ.setdefault("GRADIO_TEMP_DIR", UPLOADS.name)

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from demo import api, chat_tab, compare_tab, dashboard, page, uploads  # noqa: E402
from demo.guard import Guard  # noqa: E402
from demo.line import Line  # noqa: E402
from demo.pictures import MAX_BYTES  # noqa: E402
from demo.service import Service  # noqa: E402
from demo.sessions import MAX_SESSIONS, remember_little  # noqa: E402
from demo.voice import Voice, add_model_arguments, load_voices  # noqa: E402
from demo.votes import VoteFile  # noqa: E402
from demo.words import LANGUAGES, Words  # noqa: E402

TINY = Path("runs/tiny/final")
TRAIN_LINE = "torchrun --nproc_per_node=2 train/main.py"
FONTS = ("system-ui", "Noto Sans CJK SC", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "monospace")
MAX_EVENTS = 256  # of Gradio's queue: pages that wait for anything at all
SMALLEST_CLIP = 200  # pixels a side; models that see less have learned coloured shapes

TINY_EXAMPLES = (
    ("easy_vqa/images/test/0.png", "what color is the shape?"),
    ("easy_vqa/images/test/1.png", "what shape is in the image?"),
    ("easy_vqa/images/test/2.png", "is there a circle?"),
    ("easy_vqa/images/test/3.png", "图中是什么形状？"),
)
PHOTOGRAPHS = (
    ("cat.jpg", "What is the animal looking at?"),
    ("coffee.jpg", "请详细描述这张图片。"),
    ("rocket.jpg", "What is happening in this picture?"),
    ("china.jpg", "这是什么地方？有什么特点？"),
)
CSS = """
.status { min-height: 1.6em; font-size: .85em; opacity: .85; }
#chat-examples thead, #compare-examples thead { display: none; } /* Gradio does not translate it */
#chat-examples td, #compare-examples td { text-align: left; }
iframe.look { width: 100%; height: 900px; border: 0; }
"""

TEXTS = {
    "app_title": (
        "## plain-llava\nLLaVA-1.5 in plain PyTorch: ask about a picture, then look inside.",
        "## plain-llava\n纯 PyTorch 写成的 LLaVA-1.5：针对图片提问，再看看模型内部。",
    ),
    "app_chat": ("Chat", "对话"),
    "app_compare": ("Compare", "对比"),
    "app_runs": ("Runs", "训练与评测"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, default=str(TINY))
    parser.add_argument("--compare", metavar="WHAT", help="another model beside it, or 4bit or 8bit: the same in fewer")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network: give --auth, too")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="who may use it (or $PLAIN_LLAVA_AUTH, which ps hides)")
    parser.add_argument("--share", action="store_true", help="a public address for a week, through Gradio's servers")
    parser.add_argument("--language", choices=LANGUAGES, help="of the page, instead of each browser's own")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs the dashboard shows")
    parser.add_argument("--log-dir", type=Path, help="write votes of comparisons, with their pictures, below it")
    parser.add_argument("--max-waiting", type=int, default=16, help="requests that wait; more are told to come back")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="the longest answer anybody may ask for")
    arguments = parser.parse_args()
    auth = arguments.auth or os.environ.get("PLAIN_LLAVA_AUTH")
    for name in ("max_waiting", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1")
    if auth is not None and not all(auth.partition(":")):
        parser.error("--auth: expected USER:PASSWORD")
    if arguments.model_path == str(TINY) and not TINY.is_dir():
        sys.exit(f"error: there is no {TINY} yet: train it ({TRAIN_LINE}), or name another with --model-path")
    try:
        voices = load_voices(arguments, arguments.compare)
        service = Service(voices, Line(arguments.max_waiting), arguments.max_new_tokens)
        votes = None if arguments.log_dir is None else VoteFile(arguments.log_dir)
        parts = (page, chat_tab, compare_tab, dashboard, uploads)
        texts = {key: pair for part in parts for key, pair in part.TEXTS.items()}
        words = Words(texts | TEXTS, arguments.language)
        blocks = build_page(service, words, votes, arguments.runs)
        launch(blocks, service, words, arguments.host, arguments.port, auth, arguments.share)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")


def build_page(service: Service, words: Words, votes: VoteFile | None, runs: Path) -> gr.Blocks:
    """Make the page. Uploads are deleted after an hour."""
    examples = find_examples(service.voices[0], runs)
    with gr.Blocks(title="plain-llava", delete_cache=(600, 3600), analytics_enabled=False) as blocks:
        gr.Markdown(words.label("app_title"))
        with gr.Tab(words.label("app_chat")):
            chat_tab.build_chat(service, words, examples)
        with gr.Tab(words.label("app_compare")):
            compare_tab.build_compare(service, words, votes, examples)
        with gr.Tab(words.label("app_runs")) as tab:
            dashboard.build_dashboard(runs, words, tab)
    return blocks


def find_examples(voice: Voice, runs: Path) -> list[tuple[str, str]]:
    """Return pictures with questions that the model can answer: the tiny ones know little."""
    is_tiny = voice.model.config.vision.image_size < SMALLEST_CLIP
    folder, pairs = (runs, TINY_EXAMPLES) if is_tiny else (ROOT / "data/zh/sample", PHOTOGRAPHS)
    return [(str(folder / name), question) for name, question in pairs if (folder / name).is_file()]


def launch(
    blocks: gr.Blocks, service: Service, words: Words, host: str, port: int, auth: str | None, share: bool
) -> None:
    """Serve the page and the API until somebody presses Ctrl-C.

    Raises: OSError when the port is taken.
    """
    user, _, password = (auth or "").partition(":")
    remember_little()
    # The line decides who is next; Gradio's queue lets all through to it.
    blocks.queue(default_concurrency_limit=None, max_size=MAX_EVENTS, api_open=False)
    try:
        _, local, public = blocks.launch(
            server_name=host, server_port=port, share=share, auth=(user, password) if auth else None, quiet=True,
            prevent_thread_lock=True, max_file_size=MAX_BYTES, state_session_capacity=MAX_SESSIONS,
            enable_monitoring=False, ssr_mode=False, mcp_server=False, footer_links=[], run_history=False,
            show_error=False, i18n=words.i18n, theme=gr.themes.Soft(font=FONTS, font_mono=MONO_FONTS),
            css=CSS + chat_tab.CSS + compare_tab.CSS + dashboard.CSS,
            head=f"<script>{chat_tab.PASTE_JS}{page.LOOK_JS}</script>",
            app_kwargs={
                "routes": [*api.make_routes(service, auth), *uploads.Uploads(words).make_routes()],
                "middleware": [Middleware(Guard)],
                "docs_url": None, "redoc_url": None, "openapi_url": None,
            },
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"port {port} of {host} is taken, or not for this user: --port names another") from error
    where = f"{public} and {local}" if public else local
    print(f"open {where} in a browser; OpenAI's clients take {local}v1; Ctrl-C ends it", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
