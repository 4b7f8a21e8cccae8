"""What is asked about a picture, in our own words, and the conversation made of it.

The captions and short answers of COCO, Flickr30k, Visual Genome and VQA-v2 are English, so the Chinese prompts ask for
an English sentence, or an English word.
"""

from collections.abc import Iterable

from data.conversation import IMAGE_MARKER

SHORT_ANSWER_SUFFIX = {
    "en": "\nAnswer the question using a single word or phrase.",  # to the letter what benchmarks append
    "zh": "\n请用一个英文单词或短语回答。",
}
CAPTION_PROMPTS = {
    "en": (
        "Say in one sentence what this picture shows.",
        "What is in this photo? One sentence is enough.",
        "Caption this photo in a single sentence.",
        "In one sentence, what is happening here?",
        "Tell me in a short sentence what you see.",
        "How would you caption this picture? Use one sentence.",
        "Put what the photo shows into one sentence.",
        "I cannot see the picture. Tell me in one sentence what is in it.",
        "Sum up this photograph in one plain sentence.",
        "What would a one-sentence caption under this photo say?",
        "Please describe the scene in just one sentence.",
        "Write one sentence that someone could recognise this image by.",
    ),
    "zh": (
        "请用一句英文说说图里有什么。",
        "用一句英文概括这张照片的内容。",
        "请给这张图片写一句英文说明。",
        "这张照片拍的是什么？请用一句英文回答。",
        "请用英文写一句话，描述图中的场景。",
        "图中发生了什么？用一句英文告诉我。",
        "如果要给这张照片配一句英文图注，你会怎么写？",
        "请把你看到的内容写成一句英文。",
        "我看不到这张图，请用一句英文讲给我听。",
        "用一句简短的英文描述这个画面。",
        "请替这张照片想一句英文说明文字。",
        "一句英文就够了：画面里是什么情景？",
    ),
}


def ask_briefly(pairs: Iterable[tuple[str, str]], language: str) -> list[tuple[str, str]]:
    """Return the questions and answers of a conversation, its first question asking for short answers.

    Note: later questions do not repeat it, as in the official mixture: the first request holds for all of them.
    """
    (question, answer), *others = pairs
    return [(question + SHORT_ANSWER_SUFFIX[language], answer), *others]


def make_conversation(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return the turns of questions and answers about one picture, which the first question shows."""
    turns = [
        {"from": speaker, "value": text}
        for question, answer in pairs
        for speaker, text in (("human", question), ("gpt", answer))
    ]
    turns[0]["value"] = f"{IMAGE_MARKER}\n{turns[0]['value']}"
    return turns
