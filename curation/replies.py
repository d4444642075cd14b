"""What a model wrote, and whether that is a result: the one judge for every model that writes text.

A server, or a captioner in this process, gives a ``Reply``.  ``judge`` takes the model's reasoning off and tells
whether the rest can be a prompt (stage 02) or a caption (stage 05).  What is no result has a reason that names the
cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import xxhash

from curation.jsonio import clean_text

WHOLE, CUT = "stop", "length"

# How servers say that the model ended its reply itself (OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic), and that the
# bound on tokens ended it.
_WHOLE_WORDS = frozenset({"stop", "eos_token", "eos", "stop_sequence", "end_turn"})
_CUT_WORDS = frozenset({"length", "max_tokens", "max_length", "model_length"})
_FILTERED = frozenset({"content_filter", "safety", "recitation", "blocklist", "prohibited_content", "moderation"})
_ABORTED = frozenset({"abort", "aborted", "cancelled", "canceled"})


def ended_by(word: object) -> str:
    """A server's word for why a reply ended, in the words of ``Reply.ended``; "" where it says nothing."""
    said = word.strip().lower()[:40] if isinstance(word, str) else ""
    return WHOLE if said in _WHOLE_WORDS else CUT if said in _CUT_WORDS else said


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote.

    Attributes:
        text: The reply, with whatever stands around the result.
        ended: ``stop``: the model ended it.  ``length``: the bound on tokens did.  Anything else, "" included, is what
            the server said, and the reply is not whole.
        refused: The server says that the model refuses.
        reasoned: The model also wrote reasoning, which the server gave apart from the text.
        tokens_read, tokens_written: Of the request and of the reply, as the server counts; 0 where it does not say.
        system: The system prompt under which it was written, as far as it is known.
        adapted: How the request differed from the usual one, because the server had refused that.
    """

    text: str
    ended: str = WHOLE
    refused: bool = False
    reasoned: bool = False
    tokens_read: int = 0
    tokens_written: int = 0
    system: str = ""
    adapted: tuple[str, ...] = ()


WARMER, HOTTEST = 0.4, 1.5
_SEED_BITS = 63  # torch takes seeds of 64 bits with a sign


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which request for one text it is.

    Attributes:
        longer: The same with twice the tokens, because the reply was cut.
        warmer: So many replies were of no use.  Each further one is sampled, warmer, and from another seed.
    """

    longer: bool = False
    warmer: int = 0

    def tokens(self, first: int) -> int:
        return 2 * first if self.longer else first

    def temperature(self, first: float) -> float:
        return round(max(first, min(HOTTEST, first + WARMER * self.warmer)), 3)

    def seeds(self, first: Sequence[int]) -> list[int]:
        if not self.warmer:
            return [*first]
        return [xxhash.xxh3_64_intdigest(f"{seed}\0{self.warmer}".encode()) >> (64 - _SEED_BITS) for seed in first]


FIRST = Attempt()


@dataclass(frozen=True, slots=True)
class Form:
    """What a reply must be like.

    Attributes:
        shortest, longest: Characters.
        one_line: It is one line; otherwise paragraphs are joined to one.
        chats: A chat model wrote it, which may reason, refuse, introduce its answer or mark it up.  A model that only
            reads pictures does none of that, and the text in a picture may look like all of it.
        structure: Lists, headings, JSON and HTML are what was asked for.
    """

    shortest: int
    longest: int
    one_line: bool = False
    chats: bool = True
    structure: bool = False


PROMPT = Form(shortest=8, longest=1000, one_line=True)  # text-to-image models read 77 to 512 tokens
CAPTION = Form(shortest=1, longest=32_000)


class Verdict(NamedTuple):
    """The judge's result.

    Attributes:
        text: The prompt or caption; None where the reply is none.
        reason: Why the reply is no result, or not the whole one, as a word that is counted; "" where it is whole.
        cut: More tokens may make it whole.  ``text`` then ends with the last whole sentence, or is None.
    """

    text: str | None
    reason: str = ""
    cut: bool = False


class Answer(NamedTuple):
    """A verdict on a reply of which more is known than its text.

    Attributes:
        text, reason, cut: As of ``Verdict``.
        detail: What is wrong with the reply in words, where it does not show that at a look.
        json: The object that was asked for, of which ``text`` is a part.
        checks: What checks have measured, by their names.
        round: Of the requests that are not for more tokens alone, the number of the one that it answers, from 0.
        failed_captions: How many other captions failed a check.
        failed_checks: How many of them failed each check.
    """

    text: str | None
    reason: str = ""
    cut: bool = False
    detail: str = ""
    json: Mapping[str, Any] | None = None
    checks: Mapping[str, Any] | None = None
    round: int = 0
    failed_captions: int = 0
    failed_checks: Mapping[str, int] | None = None


def judge(reply: Reply, form: Form, *, asked: str = "", begun: str = "", source: str = "") -> Verdict:
    """Tell whether a reply is a result.

    Args:
        reply: What the model wrote.
        form: What the result must be like.
        asked: What the model was asked; a reply that repeats it is an echo.
        begun: The beginning of the result, where the request contained it.
        source: The caption that the reply rewrites.  Words that stand in it as well are no sign of talk.
    """
    if reply.refused:
        return Verdict(None, "reply_refusal")
    if len(reply.text) > _MOST_CHARACTERS:
        return Verdict(None, "reply_too_long")
    raw, finished = without_reasoning(_INVISIBLE.sub("", reply.text)) if form.chats else (reply.text, True)
    cut = reply.ended == CUT
    if not finished or (reply.reasoned and not raw.strip()):
        return Verdict(None, "reply_only_reasoning", cut)
    if reason := unfinished(reply):
        return Verdict(None, reason)
    if not raw.strip():
        return Verdict(None, "reply_cut_short" if cut else "reply_empty", cut)
    if form.one_line and len([line for line in _LINES.split(raw) if line.strip()]) > 1:
        return Verdict(None, "reply_many_lines")
    if len(raw) > _READ_FACTOR * form.longest:
        return Verdict(None, "reply_too_long")
    text = _unquoted(clean_text(begun.rstrip() + raw.strip("\r\n")))
    if len(text) > form.longest:
        return Verdict(None, "reply_too_long")
    if reason := _unfit(text, "\n".join(filter(None, map(clean_text, _LINES.split(raw)))), form, asked, source):
        return Verdict(None, reason)
    if len(text) < form.shortest or not has_word(text):
        return Verdict(None, "reply_too_short" if form.one_line else "reply_empty")
    if not cut:
        return Verdict(None, "reply_unfinished") if form.chats and _DANGLING(text) else Verdict(text)
    whole = last_whole_sentence(text)
    return Verdict(whole if len(whole) >= max(form.shortest, _SHORTEST_SENTENCE) else None, "reply_cut_short", True)


def unfinished(reply: Reply) -> str:
    """The reason why a reply is none that neither the model nor the bound on tokens has ended; "" for any other."""
    if reply.ended in (WHOLE, CUT):
        return ""
    if reply.ended in _FILTERED:
        return "reply_filtered"
    return "reply_aborted" if reply.ended in _ABORTED else "reply_unfinished"


# What a question may ask for in so many words, and how it forbids it.
_WANTS = re.compile(
    r"\b(?:json|yaml|xml|html|markdown|bullet(?:ed)?|bullets|lists?|numbered|table|tags|headings?|key-value)\b",
    re.IGNORECASE,
).search
_FORBIDS = re.compile(r"\b(?:no|not|without|avoid|never|don't)\b[^.;\n]{0,60}", re.IGNORECASE)


def asks_for_structure(asked: str) -> bool:
    """Whether a question asks for a list, JSON, markdown or similar, so that these are no faults of the reply."""
    return bool(_WANTS(_FORBIDS.sub("", asked)))


# ---- reasoning

_THINKING = (
    r"(?:think(?:ing)?|(?:chain[_-]of[_-])?thoughts?|reason(?:ing)?(?:[_-]process)?|reflection|scratchpad|analysis|seed:think"
    r"|cot|inner[_-]monologue)"
)
_TAG = re.compile(
    rf"(?P<start><\s*{_THINKING}(?:\s[^<>]{{0,60}})?>|<\|think(?:ing)?\|>|\[THINK(?:ING)?\]"
    rf"|<details\s[^<>]{{0,200}}\breasoning\b[^<>]{{0,99}}>|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<unused94>(?:thought)?"
    rf"|<\|channel>\s*(?:thought|thinking|analysis)\b)"
    rf"|(?P<end><\s*/\s*{_THINKING}\s*>|<\|/think(?:ing)?\|>|\[/THINK(?:ING)?\]|</details>|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<unused95>"
    rf"|<channel\|>|<\|channel>\s*(?:final|response)\b\s*)",
    re.IGNORECASE,
)
# gpt-oss: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
_FINAL_CHANNEL = re.compile(r"<\|channel\|>\s*final\b[^<\n]{0,40}(?:<\|constrain\|>[^<\n]{0,40})?(?:<\|message\|>)?")
_CHANNEL_MARKS = frozenset(("<|channel|>", "<|message|>", "<|constrain|>"))
_CHANNEL_ENDS = re.compile(r"<\|(?:end|return|start|call)\|>")
_ANSWER = re.compile(
    r"\s*(?:<(?P<tag>(?:final_)?answer|response|solution|final|output)>(?P<inner>.*)</(?P=tag)>"
    r"|<\|begin_of_(?P<box>box|solution)\|>(?P<boxed>.*)<\|end_of_(?P=box)\|>"
    r"|<\|START_RESPONSE\|>(?P<response>.*)<\|END_RESPONSE\|>)\s*",
    re.IGNORECASE | re.DOTALL,
)
_GRANITE = re.compile(r"\s*here(?:'s| is) my thought process:(?P<thought>.*)", re.IGNORECASE | re.DOTALL)
_GRANITE_ANSWER = re.compile(r"here(?:'s| is) my response:", re.IGNORECASE)


def without_reasoning(text: str) -> tuple[str, bool]:
    """Take a model's reasoning off its reply.

    Returns:
        The rest; and False where the reasoning has no end, so that no result follows it.
    """
    if "<|channel|>" in text:
        finals = [match.end() for match in _FINAL_CHANNEL.finditer(text)]
        if not finals:
            return "", False
        text = _CHANNEL_ENDS.split(text[finals[-1] :], maxsplit=1)[0]
    elif re.match(r"\s*analysis(?=[A-Z]|.{0,20000}assistant\s?final)", text, re.DOTALL):  # the same without its tokens
        _, found, text = text.rpartition("assistantfinal" if "assistantfinal" in text else "assistant final")
        if not found:
            return "", False
    kept: list[str] = []
    inside, place = False, 0
    for tag in _TAG.finditer(text):
        if tag["start"] and not inside:
            kept.append(text[place : tag.start()])
            inside = True
        elif tag["end"]:
            if not inside:  # an end alone: the chat template had written the start
                kept.clear()
            inside, place = False, tag.end()
    if inside:
        return "".join(kept), False
    rest = "".join([*kept, text[place:]])
    if granite := _GRANITE.match(rest):
        answer = _GRANITE_ANSWER.search(granite["thought"])
        if answer is None:
            return "", False
        rest = granite["thought"][answer.end() :]
    if answer := _ANSWER.fullmatch(rest):
        rest = answer["inner"] or answer["boxed"] or answer["response"] or ""
    return rest, True


def open_reasoning(text: str) -> str:
    """The mark that begins a model's reasoning and has no end in ``text``; "" where there is none."""
    opened = ""
    for tag in _TAG.finditer(text):
        opened = tag["start"] or ""
    return opened


def is_reasoning_mark(token: str) -> bool:
    """Whether a token begins or ends a model's reasoning, alone or with the word behind it."""
    return any(_TAG.fullmatch(token.strip() + word) for word in ("", "thought")) or token in _CHANNEL_MARKS


# ---- what is no result

_MOST_CHARACTERS = 1 << 19  # with all reasoning
_READ_FACTOR = 4  # a text that is longer than so many times the longest result is not looked at
_SHORTEST_SENTENCE = 8
_MOST_QUOTES = 6
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # they join or part nothing that is seen, and hide words
_LINES = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+")
_WORD = re.compile(r"[^\W\d_]{2}|[^\W_]").search
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}").search
_QUOTED = {'"': '"', "“": "”", "„": "“", "'": "'", "‘": "’", "«": "»", "`": "`", "*": "*"}
_DANGLING = re.compile(r"\s(?:a|an|the|and|or)$").search  # no sentence ends like this, whatever the server says
_QUOTATION = re.compile(r'"[^"]{1,300}"|“[^”]{1,300}”|„[^“”]{1,300}[“”]|«[^»]{1,300}»')

_CANNOT = (
    r"(?:I\s*(?:'m| am)?|we\s*(?:'re| are)?)\s*(?:(?:really|very|so|just|unfortunately|currently)\s+)?"
    r"(?:ca ?n'?t|cannot|can not|could not|couldn'?t|won'?t|will not"
    r"|(?:(?:must|have to|need to)\s+)?(?:\w+ly\s+)?decline"
    r"|don'?t feel comfortable|do not feel comfortable"
    r"|(?:not|un)\s*(?:able|comfortable|permitted|allowed|going))"
)
_HELP = (
    r"(?:\s+to)?\s+(?:\w+ly\s+)?(?:assist|help|provide|describ|identif|comply|fulfil|rewrit|modif|generat|creat|answer"
    r"|continue|process|view|access|determin|recogni|discuss|engag|support|confirm|speculat|complet|edit|alter|portray"
    r"|depict|produce|offer|perform|do (?:that|this|so)|reproduc|analy|assess|infer|comment|share|fulfill|caption"
    r"|(?:see|read|open) (?:the|this|that|any|an|your) (?:image|picture|photo|attach))"
)
# How refusals begin in other languages.
_ABROAD = (
    r"(?:很|非常)?(?:抱歉|对不起|對不起|不好意思)|作为(?:一个|一名)?(?:AI|人工智能)|我(?:无法|無法|不能|没办法)|申し訳|すみません"
    r"|恐れ入り|죄송|미안|도와드릴 수 없|عذر|آسف|لا (?:أستطيع|يمكنني)|मुझे (?:खेद|क्षमा)|क्षमा करें|ขอโทษ|ขออภัย"
    r"|xin lỗi|tôi không thể|(?:es )?tut mir leid\b|entschuldig(?:ung|en sie)\b"
    r"|ich (?:kann|darf|werde)\b[^.]{0,60}\bnicht\b|je suis (?:vraiment )?désolée?\b|désolée?,"
    r"|je ne (?:peux|suis) (?:malheureusement )?pas\b|l[oa] (?:siento|lamento)\b|lamento,|no puedo\b|mi dispiace\b"
    r"|spiacente,|non posso\b|sinto muito\b|desculp[ae]\b|não (?:posso|consigo)\b|het spijt me\b"
    r"|ik kan\b[^.]{0,60}\bniet\b|извините|простите,|к сожалению, я|я не мо(?:гу|жем)|вибачте|на жаль, я"
    r"|przepraszam\b|przykro mi\b|nie mogę\b|omlouvám se|nemohu\b|üzgünüm|maaf,|saya tidak (?:bisa|dapat)|beklager\b"
    r"|tyvärr kan jag|jag kan inte\b|undskyld\b|olen pahoillani|λυπάμαι|îmi pare rău|sajnálom"
)


def _found(pattern: str, flags: re.RegexFlag = re.IGNORECASE) -> Callable[[str], bool]:
    """Whether a text has the pattern.  It is compiled when the first text comes: all of them take 13 ms, for which runs
    with nothing to do would wait too."""

    @cache
    def search() -> Callable[[str], object]:
        return re.compile(pattern, flags).search

    return lambda text: bool(search()(text))


# What carries such words when a caption begins with them.
_PRINTED = _found(
    r"\b(?:t-?shirts?|shirts?|tees?|hoodies?|sweat(?:er|shirt)s?|mugs?|cups?|posters?|signs?|stickers?|cards?|prints?|caps?|hats?"
    r"|bags?|totes?|memes?|quotes?|lyrics|tattoos?|books?|albums?|covers?|banners?|slogans?|aprons?|magnets?)\b",
)
_SORRY = _found(
    r"^\W*(?:(?:(?:I'm|I am|we're|we are) (?:\w+ ){0,2}(?:sorry|afraid)|sorry|my apologies|unfortunately"
    r"|(?:I|we) (?:must )?apologi[sz]e)\b(?=\W*(?:but\b|for\b|I\b|as\b|that\b|no\b|the\b|this\b|we\b|it\b|$|[,.!]))"
    rf"|{_CANNOT}\b"
    r"|it(?:'s| is| would be) (?:not|in)\s*appropriate\b"
    r"|(?:I'm|I am) (?:just |only )?(?:a|an) (?:\w+ )?(?:language|text-based|AI)\b"
    r"|this (?:request|content|image) (?:may |might )?(?:violates?|goes against|is against|is harmful)\b"
    r"|it(?:'s| is) (?:not possible|impossible) (?:for me )?to (?:describe|determine|identif|rewrit|tell|say|see)"
    r"|(?:the |your |this )?request (?:was |is |has been )?(?:declined|denied|refused|rejected)\W*$"
    rf"|(?:no|nope)\W*$|{_ABROAD})",
)
_REFUSAL = _found(
    rf"(?:^|[.!?]\W{{0,4}}\s|[,;]\s(?:but\s|so\s)?)(?:{_CANNOT}|I(?: prefer|'d rather| would rather) not){_HELP}"
    r"|\bas an? (?:AI|artificial intelligence|(?:large )?language model|text-based|vision model)\b"
    r"|\b(?:no|without an?) (?:image|picture|photo)s? (?:(?:was|is|has been|were) )?"
    r"(?:provided|attached|uploaded|included|given|shared)\b"
    r"|\byou (?:haven't|have not|didn't|did not) (?:\w+ )?(?:provid|upload|attach|shar|includ|given)\w*"
    r" (?:me )?(?:with )?(?:an?|any|the|your) (?:image|picture|photo|sentence|caption|file)"
    r"|^\W*(?:it (?:looks like|seems|appears)(?: that)? )?the (?:image|picture|photo)"
    r" (?:(?:could not|couldn't|cannot|can't) be|(?:didn't|did not|failed to))"
    r" (?:load|upload|process|display|open|read|retriev)"
    r"|\b(?:please|(?:could|can|would) you(?: please)?) (?:provide|upload|attach|share)\b.{0,30}"
    r"\b(?:image|picture|photo|sentence|caption|context|details|information)\b"
    r"|\bI (?:don't|do not) (?:see|have) (?:an?|any|the|access to|the ability)\b.{0,40}"
    r"\b(?:image|picture|photo|attachment|view|see)s?\b"
    r"|\b(?:how (?:can|may) I (?:help|assist)|what would you like me to)\b[^.!?]{0,60}\?\W*$"
    r"|\b(?:sentence|request|caption|description|image)\b[^.]{0,40}\b(?:would|could|may|might)"
    r" (?:perpetuat|reinforc|promot)\w+\b[^.]{0,30}\b(?:stereotyp|bias|discriminat|harm)"
    r"|\b(?:against|violates?) (?:my|our|the|openai's?) (?:\w+ )?(?:guidelines|polic(?:y|ies))\b"
    r"|^\W*leider kann ich",
)


def _refuses(plain: str) -> bool:
    if _REFUSAL(plain):
        return True
    return _SORRY(plain) and not _PRINTED(plain)


_RESULT = r"(?:sentence|caption|description|version|prompt|text|summary|title|rewrite|response|answer|output|result)"
_PICTURE = r"(?:the|this) (?:image|picture|photo(?:graph)?)"
_KIND = (
    r"(?:image|picture|photo|possible|suitable|good|final|short|brief|concise|long|detailed|generated|suggested|example"
    r"|sample|new|alternative|(?:one|single)-sentence)"
)
# They are tried in this order, on the text without what stands in quotation marks.
_TALK = (
    ("reply_refusal", _refuses),
    (
        "reply_reasoning",
        _found(
            r"^\W*(?:(?:okay|ok|alright|hmm+|well|first|so|now|wait|got it)\b\W*){0,5}"
            r"(?:the user(?:'s|\s(?:is|wants|asked|asks|gave|has|provided|needs|just))\b"
            r"|user (?:wants|asked|asks|gave|provided) (?:me|us|for|a|an|the|to)\b"
            r"|(?:reasoning|thoughts?|(?:my )?thought process|thinking|step-by-step|analysis)\W{0,3}:"
            r"|thinking\s*(?:\.{3}|…)"
            r"|step 1\W{0,3}:.*\bstep 2\b"
            r"|let(?: me|'s) (?:think|analy|start by|look at (?:the|this)|break (?:this|it) down|reconsider"
            r"|(?:rewrit|describ|caption|summari[sz])\w* (?:the|this|it)\b)"
            r"|(?:the|my|our) task (?:is|here is|requires)\b|(?:so|now|here),? the task\b"
            r"|to (?:rewrite|describe|caption|modify) (?:the|this|it)\b[^.]{0,60}[,:]? (?:I|we)(?:'ll|\b)"
            r"|(?:we|I)(?:'ll| will| need to| should| have to| must) (?:first )?(?:rewrite|describe|produce|write"
            r"|output|answer|change|caption|respond|generate|analy[sz]e|look at|identify)\b)"
        ),
    ),
    (
        "reply_preamble",
        _found(
            r"^\W*(?:(?:sure|sure thing|certainly|of course|absolutely|okay|ok|no problem|got it|understood|gladly"
            r"|alright|as (?:you )?requested)\s*(?:[,!:.](?!\w|\s*magazine)|\s[-–—]+\s)"
            r"|(?:no worries|you got it|happy to help|(?:great|good|nice|excellent) (?:question|choice|request))\s*!"
            r"|yes\s*[,!:.]\s*(?:here\b|I\b|the (?:image|sentence|caption)\b)"
            r"|(?:I'd|I would|I'm|I am) (?:be )?(?:happy|glad) to\b"
            r"|(?:great|perfect|excellent)\s*!"
            r"|(?:hi|hello|hey)(?: there)?\s*! (?:an?|the|here|how|in|this|I)\b|here you (?:go|are)\b"
            r"|thank(?:s| you) for (?:sharing|providing|the|your)\b"
            rf"|(?:a|the|one)?\s?(?:{_KIND} )?(?:caption|description|prompt)"
            rf" (?:(?:for|of) {_PICTURE} )?(?:is|would be|could be|might be)\b"
            rf"|here(?:'s| is| are)\b.{{0,80}}?(?::|\b{_RESULT}\b)|here(?:'s| is) (?:my|one|another)\b.{{0,40}}:"
            rf"|(?:below|(?:the )?following) is\b.{{0,60}}\b{_RESULT}\b"
            r"|based on (?:the|this|your) (?:image|picture|photo|sentence)[^.]{0,40}, here\b"
            r"|(?:the )?(?:modified|rewritten|revised|new|updated|edited|final) (?:sentence|caption|text|version"
            r"|prompt)(?:\W{0,3}\s*:|\s+(?:is|reads|would be|could be)\b)"
            rf"|(?:(?:the|my|a) )?(?:{_KIND} ){{0,2}}(?:{_RESULT}|rewritten|modified|revised|image|subject|alt text)"
            rf"(?: (?:for|of) {_PICTURE})?\W{{0,3}}\s*(?::|-+>|=>|\s-\s(?=(?:an?|the|two)\b))"
            r"|(?:option|alternative|version|variant|variation|suggestion|choice|answer|caption|sentence|description)"
            r"\s*\W?(?:[1-9]|one|[AB])\W{0,3}\s*:"
            r"|(?:(?:natürlich|gerne|bien sûr|claro(?: que s[ií])?|por supuesto|certo|конечно)\s*[!,:.]+ )?"
            r"(?:voici (?:une?|la|le|l'|votre)|aqu[ií] (?:tienes?|est[áa]|vai)|hier (?:ist|sind) (?:die|der|eine?)"
            r"|ecco (?:la|una)"
            r"|вот)\b.{0,60}?:"
            r"|(?:好的|当然(?:可以)?|沒問題|没问题|はい|もちろん|네|물론)[\s,，、!！。:：]|(?:以下|下面)(?:是|は).{0,40}?[:：])"
        ),
    ),
    (
        "reply_remark",
        _found(
            r"(?:^|[.!?\n]\s+|[(\[]\s?|\*\s?)\*{0,3}(?:note|explanation|remark|disclaimer)\b[^:\n]{0,20}:"
            r"|[.!?\n]\W{0,4}\s(?:changes(?: made)?|rationale|reasoning)\W{0,3}:"
            r"|\bI(?:'ve| have)? (?:changed|replaced|modified|rewritten|adjusted) the\b"
            r"|(?:[.!?\n]\W{0,4}\s|[(\[]\s?)I(?:'ve| have)? (?:changed|replaced|modified|rewritten|rewrote|adjusted"
            r"|kept|maintained|preserved|swapped|substituted|added|removed)\b"
            r"|[.!?\n]\W{0,4}\s(?:please note that|in this (?:version|revision|rewrite),"
            r"|this (?:version|sentence|rewrite|revision) (?:now )?(?:portrays|maintains|keeps|preserves|retains"
            r"|replaces|reflects|changes)"
            r"|how does (?:that|this) sound|does (?:this|that) work|do you need anything)\b"
            r"|[.!?\n]\W{0,4}\s(?:alternatively|or)\s*:"
            r"|[(\[](?:about |approx\w*\.? )?\d{1,3} (?:words|characters|tokens)[)\]]|[.!?\n(]\W{0,4}word count\s*:"
            r"|(?:^|[.!?\n]\W{0,4}\s)(?:(?:I )?hope (?:this|that|it) helps|let me know (?:if|whether|what)"
            r"|would you like me to"
            r"|feel free to (?:ask|let)|is there anything else|do you want me to"
            r"|if you(?:'d| would) like(?: me)?(?: to|,))(?!\w)"
        ),
    ),
)
# What a program, or a model with nothing to say, writes in place of a text.
_NOTHING = _found(
    r"^\W*(?:none|null|nil|undefined|nan|n/a|not applicable|\[?object object\]?|empty|blank|untitled|error"
    r"|(?:no|empty) (?:caption|description|text|image|content|response|output|answer)"
    r"(?: (?:available|provided|found|given))?"
    r"|(?:internal server error|bad gateway|service unavailable|gateway time-?out|too many requests"
    r"|rate limit exceeded))\W*$"
)
_ECHOED_QUESTION = _found(r"^\W*(?:sentence|group)\W?\s*:|\b(?:sentence|group)\W?\s*:\s*[\"“']")
_ROLE = _found(
    r"^\W*(?:assistant|user|system)\s*:|^\W*human\s*:.*\bassistant\s*:|^(?:assistant|user|system|model)\s*\n"
    r"|#{2,}\s*(?:human|user|assistant|instruction|response|input|output)\s*:"
    r"|[.!?\n]\s*(?:human|user)\s*:[^<]{0,400}\bassistant\s*:"
)
_TOKENS = _found(
    r"<\|[^<>|]{1,40}\|>|<｜[^<>]{1,40}｜>|</?(?:think|s|bos|eos|pad|unk|mask|(?:start|end)_of_[a-z]{3,20}|turn"
    r"|image|img|loc_\d+|unused\d+|extra_id_\d+|image_soft_token|0x[0-9A-F]{2})>|<\|?(?:turn|channel)\|?>|\[/?INST\]|\[TOOL_CALLS?\]|<</?SYS>>"
    r"|◁[^▷]{1,20}▷|▁\w|(?:Ġ\w+\s*){2}|\[(?:insert|your)\b[^\]]{0,60}\]|<end>|\[/?(?:END|EOS|s)\]\W*$"
)
_HTML = (
    r"</?(?:a|b|i|u|p|br|hr|em|strong|div|span|ul|ol|li|h[1-6]|html|head|body|title|table|tr|td|th|img|code|pre|script|style|svg"
    r"|center|font|sub|sup|blockquote|iframe|caption|sentence|answer|response|output|description|text|prompt|result)"
    r"(?:\s[^<>]{0,200})?/?>|<!--|<!doctype"
)
_STRUCTURE = (
    _found(_HTML),
    # Any tag around the whole, or a gesture before it: *smiles*
    _found(r"\A\s*<[a-z][\w:-]*(?:[\s=][^<>]{0,200})?/?>|</[a-z][\w:-]*\s*>\s*\Z", re.IGNORECASE),
    _found(r"\A\s*\*[a-z][^*\n]{1,80}\*\s+[A-Z]", re.NOFLAG),
    # A place that is to be filled in: [group], {sentence}, {{ caption }}, <group>
    _found(
        r"[\[{<]\s*(?:group|ethnicity|gender|sentence|caption|description|prompt|answer)(?:\s+(?:here|name))?\s*[\]}>]"
        r"|\{\{[^{}]{0,60}\}\}"
    ),
    _found(
        r"```|\\(?:boxed|text|mathrm|textbf)\{|!?\[[^\]\n]{1,200}\]\(https?:"
        r"|(?<!\w)\*\*(?=\S)[^*\n]{1,200}?\*\*(?!\w)|(?<!\w)__(?=\S)[^_\n]{1,200}?__(?!\w)"
    ),
    _found(
        r"^\s*(?:#{2,6}\s*\S|#\s+[^\W\d])|^\s*\|?(?:\s*:?-{3,}:?\s*\|)+|^\s*(?:-{3,}|\*{3,}|={3,})\s*$", re.MULTILINE
    ),
    _found(
        r"\A\s*(?:[-*•‣▪>]|[=-]>|→|\(?1[.)](?=\s+An?\b))\s+\S|\A\s*\(?1[.)]\s.*\s\(?2[.)]\s+[^\W\d_]|(?:^|\n)\s*(?:[-*•‣▪]|\d{1,2}[.)])\s+\S[^\n]*\n+\s*(?:[-*•‣▪]|\d{1,2}[.)])\s+\S",
        re.NOFLAG,
    ),
    _found(
        r"\A\s*\[?\s*\{\s*[\"'\w]+\s*:|\A\s*\[\s*[\"'{]|\A\s*[\"'][\w ]{1,30}[\"']\s*:\s*[\"'\[{]"
        r"|[\"']\s*:\s*[\"'\[{][^\n]*\}\s*\Z|\A\s*\{\s*\"|\A\s*<\?xml",
        re.NOFLAG,
    ),
)


def has_word(text: str) -> bool:
    """Whether a text says anything: a word of two letters, or a letter or digit."""
    return bool(_WORD(text))


def _unfit(text: str, raw: str, form: Form, asked: str, source: str) -> str:
    """Why a text is no result; "" where nothing speaks against it.  raw: its lines, each without blanks around it."""
    plain = text.replace("’", "'").replace("‘", "'")
    bare = _without_quotations(text)
    if form.chats and _NOTHING(text):
        return "reply_empty"
    if _ROLE(raw.strip()) or (form.one_line and _ECHOED_QUESTION(plain)) or _repeats(plain, asked):
        return "reply_echo" if form.chats else ""
    if form.chats:
        for reason, gives_away in _TALK:
            if gives_away(bare) and not (source and gives_away(_without_quotations(source))):
                return reason
    if _TOKENS(plain):
        return "reply_markup"
    if form.chats and not form.structure and any(found(raw) for found in _STRUCTURE) and not _only_around(raw):
        return "reply_markup"
    if form.one_line and text and not _TWO_LETTERS(text):
        return "reply_too_short"
    return "reply_repetition" if repeats_endlessly(text) else ""


def _without_quotations(text: str) -> str:
    return _QUOTATION.sub('""', text.replace("’", "'").replace("‘", "'"))


def _only_around(raw: str) -> bool:
    """Whether the only markup is emphasis or quotation around the whole, which is taken off."""
    inner = _unquoted(clean_text(raw))
    return inner != clean_text(raw) and not any(found(inner) for found in _STRUCTURE)


def _repeats(text: str, asked: str) -> bool:
    """Whether a text holds the beginning of the question."""
    question = " ".join(re.findall(r"\w+", asked.lower()))[:60]
    return len(question) >= 20 and question in " ".join(re.findall(r"\w+", text.lower()))


def _unquoted(text: str) -> str:
    """The text without quotation marks around the whole of it."""
    for _ in range(_MOST_QUOTES):
        if not (len(text) > 1 and _QUOTED.get(text[0]) == text[-1] and text[-1] not in text[1:-1].strip("*")):
            break
        text = text[1:-1].strip()
    return text


# ---- repetition and sentences

_LONGEST_PHRASE = 60  # words
_SENTENCES = re.compile(r"[.!?]+(?:\s|$)")
_SAME_CHARACTERS = re.compile(r"([^\s\d]{1,12}?)\1{24,}").search


def repeats_endlessly(text: str) -> bool:
    """Whether a text says the same again and again, as a model does that finds no end.

    A word eight times in a row, two words six times, a phrase four times, or eight words or a sentence three times.
    """
    if _SAME_CHARACTERS(text):
        return True
    sentences = [sentence for sentence in _SENTENCES.split(text.lower()) if " " in sentence.strip()]
    if any(one == two == three for one, two, three in zip(sentences, sentences[1:], sentences[2:], strict=False)):
        return True
    words = text.lower().split()
    if len(words) < 8 or len({*pairwise(words)}) > 0.9 * len(words):
        return False
    for size in range(1, min(_LONGEST_PHRASE, len(words) // 3) + 1):
        times = 8 if size == 1 else 6 if size == 2 else 4 if size < 8 else 3
        run = 0
        for one, other in zip(words, words[size:], strict=False):
            run = run + 1 if one == other else 0
            if run >= size * (times - 1):
                return True
    return False


_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|No|vs|Prof|Sr|Jr|Inc|Ltd|Co|Corp|etc|approx|ca|e\.g|i\.e|a\.m|p\.m|U\.S|fig|vol|Mt|Ft|Ave)|\b[A-Z])\.$"
).search


def last_whole_sentence(text: str) -> str:
    """The text up to the end of its last whole sentence; "" where it has none."""
    for end in reversed([match.end() for match in _SENTENCE_END.finditer(text)]):
        if end == len(text) or not _ABBREVIATION(text[max(0, end - 12) : end]):
            return text[:end]
    return ""
