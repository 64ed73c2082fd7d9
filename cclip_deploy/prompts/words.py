"""Vocabulary and tokens of the prompt reader (`reader.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cclip_deploy.prompts.spelling import resembles, respell

SIDE, BOTH, EXTENT, ZONE, ALL, SITE, NOUN = "S", "B", "E", "Z", "A", "X", "N"
NUMBER, AND, PREPOSITION, FILLER, FINDING, COMMA, CLOSING, STOP = "D", "&", "o", "f", "F", ",", ")", ";"
UNCLEAR, UNKNOWN = "!", "U"

_KINDS = {
    BOTH: "both",
    EXTENT: "bilateral bilaterally",
    ALL: "all entire whole throughout entirely entirety",
    NOUN: """lung lungs lobe lobes zone zones field fields region regions area areas part parts portion portions third
        thirds section sections segment segments quadrant quadrants hemithorax hemithoraces hemithoraxes side sides
        sided site sites location locations level levels aspect aspects division divisions territory territories
        compartment compartments chest thorax lungfield lungfields""",
    NUMBER: "one two three four five six seven eight nine ten eleven twelve",
    AND: "and plus also",
    PREPOSITION: "of in within on at from to inside over across for into through",
    FILLER: """a an the its their this that these those with as well along together is are was were be been being has
        have had which where both there here it by namely including include includes comprising e g i per mainly
        mostly primarily predominantly predominant chiefly especially particularly only just some more most very each
        every same single unilateral unilaterally shows show showing seen noted visible present located found
        identified demonstrated demonstrates observed evident involving involves involve involved involvement affecting
        affects affect affected extending extends extend spanning covering occupying predominating concentrated
        distributed confined limited restricted localized localised situated find segment mark outline please
        image picture film radiograph scan ct cxr xray x ray patient s new old stable chronic acute mild moderate severe
        marked slight small large extensive minimal subtle faint dense hazy patchy diffuse focal multifocal scattered
        confluent asymmetric symmetric peripheral central perihilar hilar lateral medial anterior posterior basal
        subpleural pleural interstitial alveolar nodular reticular linear streaky ill well defined likely probable
        possible suspected suggestive consistent compatible concerning representing due secondary related""",
    FINDING: """pulmonary infection infections infected infectious pneumonia pneumonias covid coronavirus sars cov ncov
        disease opacity opacities opacification opacifications consolidation consolidations consolidative infiltrate
        infiltrates infiltration infiltrations lesion lesions nodule nodules mass masses shadow shadows shadowing haze
        haziness ground glass groundglass ggo ggos airspace air space changes change abnormality abnormalities findings
        finding atelectasis effusion effusions edema oedema fibrosis scarring collapse patch patches spot spots focus
        foci density densities inflammation process bronchopneumonia tuberculosis cavity cavities tumor tumour target
        targets markings thickening whiteout""",
    UNCLEAR: """or either versus vs no not without absent absence negative never none neither nor free clear cleared
        clearing spared spares sparing except excepting excluding excluded excludes exclude normal unremarkable resolved
        resolving resolution uninvolved unaffected uninfected noninfected healthy intact preserved but than minus
        unless outside beyond avoid avoiding ignore ignoring omit omitting apart aside denies denied ruled improved
        cannot isn aren wasn""",
}  # fmt: skip
DENIALS = frozenset(_KINDS[UNCLEAR].split())
"""Words that negate or contrast something in their clause."""
_KIND_OF = {word: kind for kind, words in reversed(_KINDS.items()) for word in words.split()}
_ZONE_OF = {
    word: zone
    for zone, words in {
        "upper": "upper superior top apex apical apices",
        "middle": "middle mid",
        "lower": "lower inferior bottom base bases basal basilar",
    }.items()
    for word in words.split()
}
_BOTH_AND_ZONE = {"bibasilar": "lower", "bibasal": "lower", "biapical": "upper"}
_SIDE_OF = {"left": "left", "right": "right", "lt": "left", "rt": "right", "l": "left", "r": "right"}
_SITE = re.compile(r"([lr])([uml])[lz]s?")
_SIDE_OF_LETTER = {"l": "left", "r": "right"}
_ZONE_OF_LETTER = {"u": "upper", "m": "middle", "l": "lower"}
_PLACES = ("left", "right", "both", "bilateral", "unilateral", "upper", "middle", "lower")
_HIDDEN_SIDE = re.compile(r"left|right|(?:lift|let|lest|lent|loft)$|lingul|azyg|clock$|.*(?:sinist|dextr|levo|lateral)")
_MARKS = {",": COMMA, ":": COMMA, "(": COMMA, ")": CLOSING, "–": COMMA, "—": COMMA, ";": STOP, ".": STOP, "!": STOP,
          "&": AND, "/": AND, "+": AND, "?": UNCLEAR}  # fmt: skip
_AND = re.compile(r"\b(?:as well as|(?:along|together) with)\b")
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\s\w]|_")


@dataclass(frozen=True)
class Token:
    """A word or punctuation mark.

    Attributes:
        kind: one of the one-letter codes of this module, such as SIDE.
        text: word or mark, in lower case.
        value: side, zone or site that the word names.
    """

    kind: str
    text: str
    value: str = ""


def tokenize(text: str) -> list[Token]:
    """Split a text into words and marks, with spelling errors corrected, without hyphens and quotes."""
    lowered = _AND.sub("and", re.sub(r"\s-+\s", " , ", text.lower()))
    tokens: list[Token] = []
    for found in _TOKEN.findall(lowered):
        for word in (respell(found) or found).split():
            tokens += _tokens_of(word)
    return tokens


def _tokens_of(word: str) -> list[Token]:
    if not word[0].isalnum():
        return [Token(_MARKS[word], word)] if word in _MARKS else []
    if word.isdecimal():  # not isdigit: int("²") fails
        return [Token(NUMBER, word)]
    if word in _SIDE_OF:
        return [Token(SIDE, word, _SIDE_OF[word])]
    if word in _ZONE_OF:
        return [Token(ZONE, word, _ZONE_OF[word])]
    if word in _BOTH_AND_ZONE:
        return [Token(BOTH, word), Token(ZONE, word, _BOTH_AND_ZONE[word])]
    site = _SITE.fullmatch(word)
    if site is not None:
        return [Token(SITE, word, f"{_SIDE_OF_LETTER[site[1]]} {_ZONE_OF_LETTER[site[2]]}")]
    kind = _KIND_OF.get(word, UNKNOWN)
    if kind == UNKNOWN and (resembles(word, _PLACES) or _HIDDEN_SIDE.match(word)):
        kind = UNCLEAR
    return [Token(kind, word)]
