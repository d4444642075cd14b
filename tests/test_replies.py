"""Which texts of models are prompts and captions, and why the others are none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.jsonio import clean_text
from curation.replies import (
    CAPTION,
    CUT,
    PROMPT,
    Form,
    Reply,
    asks_for_structure,
    ended_by,
    judge,
    last_whole_sentence,
    repeats_endlessly,
    without_reasoning,
)

ASKED = "Describe this image in one sentence. Write the description only."

# ---- captions

SOUND = [
    "Great Wall of China in the morning fog.",
    "Thank you card with flowers on a wooden table.",
    "The title page of a book: a drawing of a ship.",
    "A caption contest for a picture of two dogs.",
    "Subject to change: a notice on a station wall.",
    "Rain, rain, rain on a window at night.",
    "Analysis of a blood sample under a microscope.",
    'A sign reads "STOP! STOP! STOP!" in red.',
    "Perfect day at the beach: three children build a castle.",
    "A T-shirt that reads \"I'm sorry, I can't hear you\" hangs on a line.",
    "I'm sorry, I can't hear you over the sound of my freedom T-shirt, worn by an Asian woman",
    "I Can't Keep Calm, I'm Getting Married mug held by a white woman",
    "A woman holds a sign that says <3 and smiles.",
    "The image shows a man with a dog. The sky is blue: a perfect day.",
    'A poster with the text: "Sure! Why not?" in red letters.',
    "This image captures a busy street. In the foreground, a man walks; in the background, cars.",
    'A slide titled "Here is the plan:" lists three points.',
    'The text reads "Note: no entry after 5 p.m."',
    "A menu with prices: 1. Soup 2. Salad 3. Fish.",
    'A book cover: "As an AI, I dream" by J. Smith.',
    "Unfortunately Yours book cover held by a Black woman",
    "Sorry We're Closed sign on a shop door",
    "A screenshot of code with a < b and c > d.",
    "The number 5 is written on a red square.",
    "A man says 'I cannot help you' in a comic panel.",
    "Very very very long hair on a young woman.",
    "A close-up of a cat, with whiskers and fur in sharp focus, lit from the left.",
    "F**k this s**t tote bag held by an Indian woman",
    "We Need to Talk About Kevin poster, held by an Asian man",
    "Note book on a desk beside a lamp.",
    "A portrait of Dr. Martin L. King, Jr. in a suit.",
    "Let me see your hands up concert poster with a Latino man",
    "Yes, Chef! apron on a Black man",
    "First, second and third place winners stand on a podium.",
    "A group of people: two women and a man.",
    'The photo shows a laptop with ChatGPT\'s reply "As an AI language model, I cannot…" on its screen.',
    "An email address @example and a #hashtag on a banner.",
    "#1 Dad mug held by a Middle Eastern man",
    'The sentence "Hello" is on the wall.',
    "A chart: sales 10, 20, 30, 40, 50, 60, 70, 80, 90.",
    "Image of a sunset over the sea.",
    "Caption this contest winner holds a trophy",
    "Okay Go band members dance on treadmills.",
    "Sure thing candy hearts on a table.",
    "Here are three kittens in a basket.",
    "Here is a man with a hat in a park.",
    "A man and a woman. He wears a hat. She wears a scarf. He holds a dog. She holds a cat. He smiles. She laughs.",
    "I am the captain now meme with a Somali man on a ship",
    "I'm a barbie girl poster with a white woman",
    "I will survive record cover with a Black woman",
    "Answering machine on a desk, 1980s.",
    "Human: the movie poster shows a face.",
    "The answer is blowing in the wind, says a sign.",
    "OK! Magazine cover with a Black woman",
    "Hello! magazine cover held by an Indian woman",
    "Hello, Dolly! poster with an Asian woman",
    "New version of the BMW logo on a wall",
    "The new prompt book held by a Latino teacher",
    "1. FC Köln player celebrates a goal",
    "10. Woman with a hat, seen by a Black man",
    "None of the women wears a hat",
    "Untitled painting by an Indian woman, 1987",
    "Error 404 T-shirt worn by an Asian man",
    "Image 3 of 12: a white woman in a red dress",
    "Product description: blue shoes worn by a Black woman",
    "Short hair: a Black woman smiles",
    "Happy to help: a Black nurse with a patient",
    "Step 1: cut the paper, an Asian girl at a table",
    "Thoughts of home, painting by an Indian man",
    "Wait for it: a Black man looks at his watch",
    "The user interface of an app held by an Indian woman",
    "The cake I made for my daughter, an Indian girl",
    "I prefer not to say: an Indian man shrugs",
    "No more plastic sign held by an Indian girl",
    "How can I help? A Black shop assistant smiles",
    "What would you like me to be: a Black child dreams",
    "Changes: the album by a Black singer",
    "A Black woman (30 years old) reads a book (2 pages)",
    "Top 5 looks: 1. red dress 2. blue suit, worn by a Black woman",
    "No puedo vivir sin ti poster with a Latino man",
    "Voici Noël: une femme blanche avec un sapin",
    "一个女人在公园里看报纸。",
]


@pytest.mark.parametrize("text", SOUND)
def test_sound_captions_that_look_like_something_else(text: str) -> None:
    assert judge(Reply(text), CAPTION, asked=ASKED) == (text, "", False)


@pytest.mark.parametrize("text", [text for text in SOUND if "sentence" not in text])
def test_they_are_sound_prompts_too(text: str) -> None:
    assert judge(Reply(text), PROMPT) == (text, "", False)


NO_CAPTIONS = [
    ("I'm sorry, but I can't help with identifying or describing people in images.", "reply_refusal"),
    ("I’m sorry, I can’t assist with that.", "reply_refusal"),
    ("I cannot provide a description of the people in this image.", "reply_refusal"),
    ("I'm unable to view images directly.", "reply_refusal"),
    ("Unfortunately, I'm not able to identify the person.", "reply_refusal"),
    ("As an AI, I cannot see images.", "reply_refusal"),
    ("The image shows a man. I cannot identify who he is.", "reply_refusal"),
    ("Please provide the image you would like me to describe.", "reply_refusal"),
    ("No image was provided.", "reply_refusal"),
    ("I don't see any image attached to your message.", "reply_refusal"),
    ("I won't describe this content.", "reply_refusal"),
    ("Lo siento, pero no puedo ayudar con eso.", "reply_refusal"),
    ("抱歉，我无法描述这张图片。", "reply_refusal"),
    ("My apologies, but I cannot comply.", "reply_refusal"),
    ("Sorry, but that goes against my guidelines.", "reply_refusal"),
    ("I must decline this request.", "reply_refusal"),
    ("It is not appropriate to guess a person's ethnicity.", "reply_refusal"),
    ("Sure! Here is a description of the image:\n\n**Subject:** A man", "reply_preamble"),
    ("Here's the caption: A man in a park.", "reply_preamble"),
    ("Certainly! A man in a park.", "reply_preamble"),
    ("Caption: A man in a park.", "reply_preamble"),
    ("**Caption:** A man in a park.", "reply_preamble"),
    ("Based on the image, here is a detailed description: A man.", "reply_preamble"),
    ("I'd be happy to describe it. A man stands.", "reply_preamble"),
    ("A man in a park. Let me know if you need more details!", "reply_remark"),
    ("A man in a park. I hope this helps!", "reply_remark"),
    ("A man in a park. Would you like me to add more?", "reply_remark"),
    ("A man.\n\nNote: I kept it short.", "reply_remark"),
    ("# A park\nA man in a park.", "reply_markup"),
    ("## Description\nA man.", "reply_markup"),
    ("- A man\n- A dog", "reply_markup"),
    ("* A man in a park", "reply_markup"),
    ("1. A man\n2. A dog", "reply_markup"),
    ("A man with **bold** hair", "reply_markup"),
    ("```\nA man in a park\n```", "reply_markup"),
    ("<p>A man in a park</p>", "reply_markup"),
    ("A man<br>in a park", "reply_markup"),
    ('{"caption": "A man in a park"}', "reply_markup"),
    ('["A man in a park"]', "reply_markup"),
    ('[{"caption": "x y"}]', "reply_markup"),
    ("{'caption': 'A man in a park'}", "reply_preamble"),
    ("A man in a park<|im_end|>", "reply_markup"),
    ("A man in a park</s>", "reply_markup"),
    ("A man <|eot_id|> user", "reply_markup"),
    ("A man in a park<end_of_turn>", "reply_markup"),
    ("[INST] A man [/INST]", "reply_markup"),
    ("A man<｜end▁of▁sentence｜>", "reply_markup"),
    ("![photo](http://a/b.jpg) A man", "reply_markup"),
    ("Describe this image in one sentence. Write the description only. A man in a park.", "reply_echo"),
    ("USER: what is it ASSISTANT: A man", "reply_echo"),
    ("assistant\nA man in a park", "reply_echo"),
    ("Here you go: A man in a park.", "reply_preamble"),
    ("The caption is: A man in a park.", "reply_preamble"),
    ("A possible caption for this image would be A man in a park.", "reply_preamble"),
    ("Title: A man in a park", "reply_preamble"),
    ("Great! A man in a park.", "reply_preamble"),
    ("Thank you for sharing this image. A man in a park.", "reply_preamble"),
    ("Reasoning: the man is old. A man in a park.", "reply_reasoning"),
    ('"caption": "A man in a park"', "reply_markup"),
    ("A [insert colour] car", "reply_markup"),
    ("\u0120A \u0120man \u0120in \u0120a \u0120park", "reply_markup"),
    ("\u2581A\u2581man\u2581in\u2581a\u2581park", "reply_markup"),
    ("A man in a park. A man in a park. A man in a park. ", "reply_repetition"),
    ("A man and a man and a man and a man and a man and a man", "reply_repetition"),
    ("the the the the the the the the the", "reply_repetition"),
    ("!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!", "reply_repetition"),
    ("A red car on the left of the road. " * 4, "reply_repetition"),
    ("Okay, the user wants a caption. A man in a park.", "reply_reasoning"),
    ("Let me think about the image. It has a man.", "reply_reasoning"),
    ("<think>hm", "reply_only_reasoning"),
    ("<thinking>\nhm ", "reply_only_reasoning"),
    ("<|channel|>analysis<|message|>hm", "reply_only_reasoning"),
    ("<|channel>thought\nhm", "reply_only_reasoning"),
    ("analysisWe need to describe", "reply_only_reasoning"),
    ("A man walks with a dog and the", "reply_unfinished"),
    ("", "reply_empty"),
    (" \n", "reply_empty"),
    ("...", "reply_empty"),
    *((text, "reply_empty") for text in ("null", "None", "N/A", "undefined", "No description available.")),
    *((text, "reply_empty") for text in ("Internal Server Error", "[object Object]", "Untitled")),
    *(
        (text, "reply_refusal")
        for text in (
            "I must respectfully decline.",
            "This request is harmful and I will not help.",
            "I'd rather not describe the people here.",
            "It is not possible for me to determine the ethnicity of a person.",
            "Rewriting the sentence this way would perpetuate harmful stereotypes.",
            "I cant help with that",
            "No.",
            "There is no image attached.",
            "It seems you haven't uploaded an image.",
            "The image could not be loaded.",
            "I don't have access to images.",
            "Can you please provide more context?",
            "Hello! How can I assist you today?",
            "What would you like me to do with this sentence?",
            "Je ne peux pas répondre à cette demande.",
            "Ich kann dieses Bild nicht beschreiben.",
            "Não posso ajudar com isso.",
            "Я не могу помочь с этим запросом.",
            "不好意思，我无法完成这个请求。",
            "すみませんが、できません。",
            "عذرًا، لا أستطيع المساعدة في ذلك.",
            "Xin lỗi, tôi không thể giúp.",
        )
    ),
    *(
        (text, "reply_reasoning")
        for text in (
            "Thought: it is a man.\nAnswer: A man in a park.",
            "Let's rewrite the sentence: A man in a park.",
            "The task is to describe the image. A man in a park.",
            "User wants a caption. A man in a park.",
            "To rewrite the sentence, I will replace the woman. A man in a park.",
            "Step 1: look. Step 2: A man in a park.",
            "Thinking... A man in a park.",
        )
    ),
    *(
        (f"{text}A man in a park.", "reply_preamble")
        for text in (
            "Revised: ",
            "Sentence: ",
            "Image Caption: ",
            "One-sentence description: ",
            "Description of the image: ",
            "A description of the image is: ",
            "My answer: ",
            "Option 1: ",
            "Caption 1: ",
            "Hi! ",
            "You got it! ",
            "Great question! ",
            "As requested, ",
            "Sure — ",
            "Result -> ",
            "Voici la description : ",
            "Hier ist die Antwort: ",
            "Aquí tienes: ",
            "好的，",
            "以下是改写后的句子：",
        )
    ),
    *(
        (f"A man in a park. {text}", "reply_remark")
        for text in (
            "(I replaced 'woman' with 'man'.)",
            "[Note: changed]",
            "Please note that this is fictional.",
            "Changes made: woman to man.",
            "This sentence portrays the given group.",
            "I've changed the woman to a man.",
            "I kept the rest unchanged.",
            "Let me know what you think!",
            "Hope this helps!",
            "(8 words)",
            "(Word count: 8)",
            "Does this work for you?",
            "Alternatively: A man reads.",
        )
    ),
    *(
        (text, "reply_markup")
        for text in (
            "1. A man in a park.",
            "1. A man reads. 2. A man walks.",
            "> A man in a park.",
            "A man in a park. <end>",
            "A man in a park. [END]",
            "A [group] man in a park",
            "A {group} man in a park",
            "{{caption}}",
            "\\text{A man in a park.}",
            "<internal>x</internal>A man in a park.",
            "<think/>A man in a park.",
            "<rewritten_sentence>A man in a park.</rewritten_sentence>",
            "*thinks* A man in a park.",
            '<tool_call>{"name": "x"}</tool_call>',
            "<function=rewrite>x</function>",
            '[TOOL_CALLS][{"name": "x"}]',
            "<start_of_image>A man in a park.",
        )
    ),
    ("A man in a park. ### Human: next", "reply_echo"),
    ("A man in a park.\n\nUser: next\nAssistant: A dog", "reply_echo"),
    ("I ca\u200bn't he\u00adlp with that.", "reply_refusal"),
    ("\u200b\ufeff\u2060", "reply_empty"),
]


@pytest.mark.parametrize(("text", "reason"), NO_CAPTIONS)
def test_replies_that_are_no_captions(text: str, reason: str) -> None:
    assert judge(Reply(text), CAPTION, asked=ASKED) == (None, reason, False)


# ---- reasoning

REASONED = [
    '<think time="3">x</think>A man in a park.',
    "<|think|>x<|/think|>A man in a park.",
    "<think>x</think>A man in a park.",
    "hm\n</think>\n\nA man in a park.",
    "<thinking>x</thinking> A man in a park.",
    "<think>\n\n</think>\n\nA man in a park.",
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>A man in a park.",
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>A man in a park.<|return|>",
    "analysisWe need it.assistantfinalA man in a park.",
    "<|channel>thought\nhm\n<channel|>A man in a park.",
    "<|channel>thought\n<channel|>A man in a park.",
    "<think>x</think><answer>A man in a park.</answer>",
    "<|channel|>final<|message|>A man in a park.",
    "[THINK]x[/THINK]A man in a park.",
    "◁think▷x◁/think▷A man in a park.",
    "<thought>x</thought>\nA man in a park.",
    "<unused94>thought\nx<unused95>A man in a park.",
    "<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>A man in a park.<|END_RESPONSE|>",
    "Here is my thought process: x Here is my response: A man in a park.",
    "<think>a</think><think>b</think>A man in a park.",
    "<|begin_of_thought|>x<|end_of_thought|><|begin_of_solution|>A man in a park.<|end_of_solution|>",
    "<seed:think>x</seed:think>A man in a park.",
    "<THINK>x</THINK> A man in a park.",
    "<|begin_of_box|>A man in a park.<|end_of_box|>",
    "<reasoning>x</reasoning>A man in a park.",
    "<reasoning_process>x</reasoning_process>A man in a park.",
    "<chain_of_thought>x</chain_of_thought>A man in a park.",
    "[thinking]x[/thinking]A man in a park.",
    '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\nA man in a park.',
    "<think>x</think><final_answer>A man in a park.</final_answer>",
    'A man<details type="reasoning">x</details> in a park.',
]


@pytest.mark.parametrize("form", [CAPTION, PROMPT], ids=["caption", "prompt"])
@pytest.mark.parametrize("text", REASONED)
def test_reasoning_is_taken_off(text: str, form: Form) -> None:
    assert judge(Reply(text), form) == ("A man in a park.", "", False)


def test_reasoning_that_was_cut_may_become_whole_with_more_tokens() -> None:
    for text in ("<think>hm", "<|channel|>analysis<|message|>hm", "<|channel>thought\nhm", "analysisWe need"):
        assert judge(Reply(text, CUT), CAPTION) == (None, "reply_only_reasoning", True)
    assert judge(Reply("", CUT, reasoned=True), CAPTION) == (None, "reply_only_reasoning", True)
    assert judge(Reply("", reasoned=True), CAPTION) == (None, "reply_only_reasoning", False)
    assert judge(Reply("A man in a park.", reasoned=True), CAPTION).text == "A man in a park."


MARKS = ("<think>", "</think>", "<|channel|>final<|message|>", "analysis", "a ", "\n")


@given(st.lists(st.sampled_from(MARKS), max_size=12))
def test_whatever_the_marks_no_reasoning_is_left(parts: list[str]) -> None:
    rest, finished = without_reasoning("".join(parts))
    assert not finished or ("<think>" not in rest and "</think>" not in rest)


# ---- what is whole


@pytest.mark.parametrize("word", ["stop", "eos_token", "stop_sequence", "STOP", "end_turn", "eos"])
def test_words_for_a_whole_reply(word: str) -> None:
    assert judge(Reply("A man in a park.", ended_by(word)), CAPTION).text == "A man in a park."


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (None, "reply_unfinished"),
        ("", "reply_unfinished"),
        (3, "reply_unfinished"),
        ("error", "reply_unfinished"),
        ("load", "reply_unfinished"),
        ("unload", "reply_unfinished"),
        ("tool_calls", "reply_unfinished"),
        ("abort", "reply_aborted"),
        ("cancelled", "reply_aborted"),
        ("content_filter", "reply_filtered"),
        ("SAFETY", "reply_filtered"),
    ],
)
def test_every_other_word_is_none(word: object, reason: str) -> None:
    assert judge(Reply("A man in a park.", ended_by(word)), CAPTION) == (None, reason, False)
    assert judge(Reply("A man in a park.", ended_by(word)), PROMPT) == (None, reason, False)


def test_a_reply_that_was_cut_ends_with_its_last_whole_sentence() -> None:
    text = "A man in a park. He wears a hat by Dr. Smith. He holds the"
    whole = "A man in a park. He wears a hat by Dr. Smith."
    for word in ("length", "max_tokens"):
        assert judge(Reply(text, ended_by(word)), CAPTION) == (whole, "reply_cut_short", True)
    assert judge(Reply("A man in a park, near St. Paul's and the", CUT), CAPTION) == (None, "reply_cut_short", True)
    assert judge(Reply("", CUT), CAPTION) == (None, "reply_cut_short", True)
    assert judge(Reply("A loop of the same. " * 9, CUT), CAPTION) == (None, "reply_repetition", False)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two", "One."),
        ("One! Two? Three", "One! Two?"),
        ('He says "Stop." And', 'He says "Stop."'),
        ("It costs 3.50 euros at J. Smith", ""),
        ("Mr. Smith", ""),
        ("一个男人在公园里。他", "一个男人在公园里。"),
        ("no end", ""),
        ("Whole.", "Whole."),
    ],
)
def test_last_whole_sentences(text: str, whole: str) -> None:
    assert last_whole_sentence(text) == whole


def test_a_refusal_that_the_server_marks() -> None:
    assert judge(Reply("A man in a park.", refused=True), CAPTION) == (None, "reply_refusal", False)


# ---- forms


def test_a_model_that_only_reads_pictures_does_not_chat() -> None:
    """The text in a picture may look like anything; what is unfinished or endless is no result all the same."""
    reads = Form(CAPTION.shortest, CAPTION.longest, chats=False)
    for text in ("Sure! Here is", "I'm sorry, but I can't help", "- one\n- two", "<b>x</b> a", "sale and"):
        assert judge(Reply(text), reads).text == clean_text(text)
    for text, ended, reason in (
        ("the " * 20, "stop", "reply_repetition"),
        ("A man", "length", "reply_cut_short"),
        ("A man</s>", "stop", "reply_markup"),
        ("A man", "abort", "reply_aborted"),
    ):
        assert judge(Reply(text, ended), reads).reason == reason


def test_structure_is_no_fault_where_it_was_asked_for() -> None:
    assert asks_for_structure("Answer in JSON.")
    assert asks_for_structure("Write a list of tags")
    assert not asks_for_structure("Describe the image. Do not use markdown or bullet points.")
    assert not asks_for_structure("Describe the image, without a list.")
    assert not asks_for_structure(ASKED)
    wanted = Form(CAPTION.shortest, CAPTION.longest, structure=True)
    for text in ('{"caption": "A man"}', "- a man\n- a dog", "# Park\nA man in **black**"):
        assert judge(Reply(text), wanted).text == clean_text(text)
        assert judge(Reply(text), CAPTION).reason == "reply_markup"
    assert judge(Reply("A man<|im_end|>"), wanted).reason == "reply_markup"


def test_the_beginning_is_part_of_the_prompt() -> None:
    assert judge(Reply(" in a red dress."), PROMPT, begun="A black woman ").text == "A black woman in a red dress."
    assert judge(Reply(", in a red dress."), PROMPT, begun="A black woman ").text == "A black woman, in a red dress."
    assert judge(Reply(" \n"), PROMPT, begun="A black woman ").reason == "reply_empty"


@pytest.mark.parametrize(
    ("text", "endless"),
    [
        ("very " * 7, False),
        ("very " * 8, True),
        ("a dog, " * 5, False),
        ("a dog, " * 6, True),
        ("a red car on " * 3, False),
        ("a red car on " * 4, True),
        ("The man in the picture wears a black hat. " * 2, False),
        ("The man in the picture wears a black hat. " * 3, True),
        ("哈" * 30, True),
        ("0000000000000000000000000000000000", False),
        ("A man, a woman, a child, a dog, a cat, a bird, a tree, a house, a car, a road and a sky.", False),
    ],
)
def test_endless_repetition(text: str, endless: bool) -> None:
    assert repeats_endlessly(text.strip()) is endless


HOSTILE = (
    "I'm sorry ", "**", "[", '"', "<", "a ", "- \n", "Here is ", "! ", "!", "{", '{"a":', "<a ", "x", "[a](", "| --- ",
    "okay ", " ", "\n", "<think>", "</think>", "<|channel|>", "<answer>", "analysis", "as an ", "no image was ", "Mr. ",
    "here is my thought process:", "based on the image ", "\U0001f642", "sentence ", ". I ", ". user: ",
    "\nuser:", "the image ", "step 1: ", "to rewrite the ", "1. ", "{{", "ich kann ",
)  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_any_text_is_judged_at_once(piece: str) -> None:
    for form in (CAPTION, PROMPT):
        for size in (form.longest - 1, 4 * form.longest - 1, 1 << 22):
            text = piece * (size // len(piece)) + "x"
            began = time.process_time()
            judge(Reply(text), form, asked=ASKED)
            judge(Reply(text, CUT), form, asked=ASKED)
            assert time.process_time() - began < 4


# ---- prompts


@pytest.mark.parametrize(
    "reply",
    [
        "A Black woman reads in a park",
        "A sign that says sorry, we are closed, held by an Asian man",
        "Here comes the bride: a Latino woman in white",
        "I'm not a fan of mornings mug, held by an Indian woman",
        "Sure-footed white male climber on a cliff",
        "A group of Asian women in a park",
        "An Indian man's death sentence is read out in court",
        "Close-up of a note on a fridge, left by a Black man",
        "A Middle Eastern woman, image of confidence",
        "Yes Theory crew: Latino man on a plane",
    ],
)
def test_sound_replies(reply: str) -> None:
    assert judge(Reply(reply), PROMPT) == (reply, "", False)


@pytest.mark.parametrize(
    ("reply", "prompt"),
    [
        ("  A Black woman reads \n\n", "A Black woman reads"),
        ('"A Black woman reads"', "A Black woman reads"),
        ("“A Black woman reads”", "A Black woman reads"),
        ("'A Black woman reads'", "A Black woman reads"),
        ("**A Black woman reads**", "A Black woman reads"),
        ('"A" and "B" seen by a woman "C"', '"A" and "B" seen by a woman "C"'),
        ("A Black\twoman\0 reads\x1b", "A Black woman reads"),
        ("A woman \ud800 reads", "A woman \ufffd reads"),
        ("\ufeffA wo\u00adman reads\u200b", "A woman reads"),
        ("A woman with a \U0001f469\u200d\U0001f52c badge", "A woman with a \U0001f469\u200d\U0001f52c badge"),
    ],
)
def test_what_is_taken_off(reply: str, prompt: str) -> None:
    assert judge(Reply(reply), PROMPT).text == prompt


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "reply_empty"),
        (" \n\t\r\n", "reply_empty"),
        ('""', "reply_too_short"),
        ("\0\x01", "reply_too_short"),
        ("A man in a park.\nI hope this helps!", "reply_many_lines"),
        ("A man\u2028in a park", "reply_many_lines"),
        ("A man\x85in a park", "reply_many_lines"),
        ('sentence: "A man in a park" group:"asian female"', "reply_echo"),
        ("Sentence: A man in a park", "reply_echo"),
        ('"sentence": "A man in a park"', "reply_echo"),
        ('A man in a park group:"asian female"', "reply_echo"),
        ("Group: asian female", "reply_echo"),
        ("I'm sorry, but I can't help with that.", "reply_refusal"),
        ("I’m sorry, I cannot do that", "reply_refusal"),
        ("I am really sorry, but no", "reply_refusal"),
        ("Sorry, I can't assist with that request.", "reply_refusal"),
        ("I cannot rewrite this sentence.", "reply_refusal"),
        ("I can't fulfill that request.", "reply_refusal"),
        ("I am unable to modify that.", "reply_refusal"),
        ("I apologize, but this is not possible", "reply_refusal"),
        ("As an AI language model, I do not have opinions", "reply_refusal"),
        ("As a large language model I cannot", "reply_refusal"),
        ("Here is the modified sentence: A man in a park", "reply_preamble"),
        ("Here's a rewritten version A man in a park", "reply_preamble"),
        ("Sure! A man in a park", "reply_preamble"),
        ("Sure, here you go: A man in a park", "reply_preamble"),
        ("Certainly. A man in a park", "reply_preamble"),
        ("Modified sentence: A man in a park", "reply_preamble"),
        ("The rewritten caption is A man in a park", "reply_preamble"),
        ("**Output:** A man in a park", "reply_preamble"),
        ("Prompt: A man in a park", "reply_preamble"),
        ("A man in a park (Note: I kept the scene)", "reply_remark"),
        ("A man in a park. I replaced the woman with a man.", "reply_remark"),
        ("<|assistant|> A man in a park", "reply_markup"),
        ("```A man in a park```", "reply_markup"),
        ("A man", "reply_too_short"),
        ("1234567890 1234567890", "reply_too_short"),
        ("word " * 300, "reply_too_long"),
        ("x" * (PROMPT.longest + 1), "reply_too_long"),
    ],
)
def test_replies_that_are_no_prompts(reply: str, reason: str) -> None:
    assert judge(Reply(reply), PROMPT) == (None, reason, False)


@pytest.mark.parametrize(
    "caption",
    [
        "I can't believe it's not butter",
        "I won't back down guitar tab",
        "Unfortunately for him, it rained",
        "Note: limited edition",
        "Thank you for your service",
        "Great! Scott comic",
        "Title: the sea",
        "Alright, alright, alright",
    ],
)
def test_words_of_the_caption_are_no_talk(caption: str) -> None:
    """A reply may say what the caption says that it rewrites."""
    reply = f"{caption}, Black woman"
    assert judge(Reply(reply), PROMPT, source=f"{caption}, woman") == (reply, "", False)
    assert judge(Reply(reply), PROMPT, source="A dog").text is None
    assert (
        judge(Reply("I'm sorry, but I can't help with that."), PROMPT, source="Thank you for your service").text is None
    )


def test_a_reply_that_was_cut_short() -> None:
    assert judge(Reply("A man in a park with a", CUT), PROMPT) == (None, "reply_cut_short", True)


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=200))
def test_any_reply_is_one_printable_line_or_none(text: str) -> None:
    prompt, reason, _ = judge(Reply(text), PROMPT)
    assert (prompt is None) == bool(reason)
    if prompt is not None:
        assert len(prompt.splitlines()) == 1
        prompt.encode()


def test_a_reply_of_four_megabytes_is_judged_at_once() -> None:
    assert judge(Reply("here is " * 500_000), PROMPT).reason == "reply_too_long"
    assert judge(Reply('"' * 4_000_000), PROMPT).text is None
