"""Split captions into words as coco-caption does: the PTBTokenizer of Stanford CoreNLP 3.4.1, a Java program, in Python.

It is a lexer: at every place the rule with the longest match, what the rule looks ahead at included, makes the next token; of
two as long the first wins. The rules are checked against what the program makes of strings sent through it. Two differences
are deliberate: a line break of any kind is a blank (pycocoevalcap shifts every caption after a carriage return by one line), and
`tokenize` reads a caption alone, so that no score depends on the order of the images (`tokenize_in_order` does as coco-caption:
the first word of the next caption decides whether a last "B." keeps its period).
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from .ptb_characters import reduce_characters

# What coco-caption drops. It lists brackets too, but in capitals, which the lexer does not write: "-lrb-" stays.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

SPELLING = str.maketrans(
    {
        **dict.fromkeys("‘‛‹\x91", "`"),
        **dict.fromkeys("’›\x92", "'"),
        **dict.fromkeys("“«\x93", "``"),
        **dict.fromkeys('"”»\x94', "''"),
        **dict.fromkeys("–—―\x96\x97", "--"),
        **dict.fromkeys("…\x85", "..."),
        **dict.fromkeys("€¤₠\x80", "$"),
        **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
        **{"£": "#", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    }
)
RUNS = {"---": "--", "----": "--", "....": "...", ".....": "..."}
ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&mdash;": "--", "&ndash;": "--", "&nbsp;": ""}

# é, the mark U+0301 and ٣ stand for all letters, marks and digits beyond ASCII; \xad, the soft hyphen, goes when a word is spelt
LETTER = r"[A-Za-zé\u0301\xad]"
WORD = rf"{LETTER}[A-Za-z0-9é\u0301٣\xad]*"
ALPHANUMERIC = r"[A-Za-z0-9é٣]"
ASCII = r"[A-Za-z0-9]"
DIGIT = r"[0-9٣]"
BLANK = r"[ \xa0]"
APOSTROPHE = r"(?:['’\x92]|&apos;)"
QUOTE = r"(?:['’‘`\x91\x92]|&apos;)"
ELISION = rf"(?:[dDlLoO]{QUOTE}{ALPHANUMERIC})?"
# In the second kind, ",-_" is a range, as it is in the program: no capitals and no digits.
HOST = r"(?:(?ai:www\.)(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^\s\"`'<>|.!?(){},-_$]+\.)+(?ai:com|net|org|edu))"
IN_EMAIL = r"[^\s\"<>|(){}]"
WORDS = rf"{WORD}(?:[.!?]{WORD})*"  # also run together across the end of a sentence
JOINED = rf"{ELISION}{ALPHANUMERIC}+(?:[-_‐‑֊]{ELISION}{ALPHANUMERIC}+)*"
HYPHENATED = rf"{ASCII}[A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\xad]+))+"  # mid-a.m.
COMPANY = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
MARKUP = rf"(?:</?{NAME}(?: +{NAME}(?:=\"[^\"]*\")?)* */?>|<[!?][A-Za-z-][^>]*>)"
EYE = r"[-^x=~<>']"

# Abbreviations keep their period. The first may end a sentence.
CLOSING = (
    "al ala apr ariz assn assoc attys aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed[.]d esq est etc ext feb "
    "fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn ph[.]d plc "
    "profs rd rt sep sept seq sq sr supts sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"
).replace(" ", "|")
STATES = "A(?ai:rk|z)|D(?ai:el)|I(?ai:ll)|L(?ai:a)|M(?ai:ass|iss)|O(?ai:re)|P(?ai:a)|T(?ai:ex)|W(?ai:ash)"  # words, in lower case
TITLES = (
    "adj adm adv alex asst atty ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov govs hon insp "
    "invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof pvt rep reps rev sen sens sfc sgt spc st "
    "ste supt treas vs wm"
).replace(" ", "|")
NON_US = r"(?ai:non-u\.s)"
NUMBERED = "art|ca|figs?|nos?|op|pp|prop"  # words, unless a number follows
# before these the period behind a single letter ends a sentence: "wears a letter B. She ..."
STARTERS = (
    (
        "A(?ai:bout|ccording|dditionally|fter|n|s|t)? B(?ai:ut) E(?ai:arlier) H(?ai:e|er|ere|owever) I(?ai:f|n|t) L(?ai:ast) "
        "M(?ai:any|ore|[rs][.]) N(?ai:ow) O(?ai:nce|ne|ther|ur) S(?ai:he|ince|o|ome|uch) "
        "T(?ai:hat|he|heir|hen|here|hese|hey|his) W(?ai:e|hat|hen|hile) Y(?ai:et|ou)"
    )
    .replace(".", r"\.")
    .replace(" ", "|")
)
FILE_TYPES = (
    "bat bmp c cgi class cpp dll docx doc exe gif gz h html htm jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql tar "
    "txt wav x xml zip"
).replace(" ", "|")

AS_WRITTEN, RESPELLED = False, True
# Where a rule looks ahead, the token is its group. Compiled by `_compiled_rules`.
RULES = [
    # words that fall into two: can|not, gon|na, do|n't, he|'s, 't|was
    (r"(?ai:(can)not|(gon|wan)na|(got)ta|(lem|gim)me)", AS_WRITTEN),
    (rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*)[nN]{QUOTE}[tT]", AS_WRITTEN),
    (rf"({WORD}(?:[.!?]{WORD})*){APOSTROPHE}(?ai:[msd]|re|ve|ll)", AS_WRITTEN),
    (r"('[tT])(?ai:is|was)", AS_WRITTEN),
    (rf"(?ai:n{QUOTE}t|(?:'|&apos;)(?:[msd]|re|ve|ll))(?![A-Za-z])", RESPELLED),
    (r"[’\x92](?ai:[msd]|re|ve|ll)", RESPELLED),
    # abbreviations
    (rf"((?:(?ai:{CLOSING})|{STATES}|[Pp]?[Pp](?:te|ty)[sS]?)\.)(?:-\S?|[^\s-])", AS_WRITTEN),
    (rf"(?:(?ai:{CLOSING}|{TITLES})|{STATES}|[Mm][ft][gG]|[Pp]?[Pp][tT][ey][sS]?)\.", AS_WRITTEN),
    (rf"((?ai:{NUMBERED})\.)\s?{DIGIT}", AS_WRITTEN),
    (rf"[A-Za-z](?:\.[A-Za-z])*\.|{NON_US}\.", AS_WRITTEN),
    (rf"{NON_US}(?=\s|$)", AS_WRITTEN),
    (rf"([A-Za-z])\.\s+(?:{STARTERS}|{MARKUP})(?!\S)", AS_WRITTEN),
    *((rf"((?:{kind})\.)[,;:]", AS_WRITTEN) for kind in (WORDS, JOINED, HYPHENATED, COMPANY)),
    (WORDS, AS_WRITTEN),
    # words with an apostrophe inside or at an end
    (rf"{APOSTROPHE}[nN]{APOSTROPHE}|{APOSTROPHE}(?:[nN]|[0-9]{{2}})(?!\S)|[’\x92][nN]", AS_WRITTEN),
    (rf"{APOSTROPHE}(?:till?|(?ai:em)|cause|[2-9]0[sS])", AS_WRITTEN),
    (rf"[dDjJlL]{APOSTROPHE}|[yY]{APOSTROPHE}(?={LETTER})|(?ai:ol|somethin|dunkin){APOSTROPHE}", AS_WRITTEN),
    (rf"[A-HJ-XZn]{QUOTE}{LETTER}{{2,}}", AS_WRITTEN),
    (rf"{LETTER}+[aeiouyAEIOUY]{QUOTE}[aeiouA-Z]{LETTER}*", AS_WRITTEN),
    (rf"(?ai:c{APOSTROPHE}(?:est|mon)|s{APOSTROPHE}mores|[eo]{APOSTROPHE}er)", AS_WRITTEN),
    (rf"(?ai:ev{APOSTROPHE}ry|li{APOSTROPHE}l|nat{APOSTROPHE}l|nor{APOSTROPHE}easter|cont{APOSTROPHE}d\.)", AS_WRITTEN),
    # numbers, and what hyphens, slashes and underscores join
    (r"[-+]?(?:[0-9٣\xad]+(?:[.,:٫٬][0-9٣\xad]+)*|(?:[.,:٫٬][0-9٣\xad]+)+)", AS_WRITTEN),
    (JOINED, AS_WRITTEN),
    (rf"{HYPHENATED}|anti-", AS_WRITTEN),
    (rf"{ASCII}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{ASCII}+(?:-[A-Za-z]+){{0,2}}){{1,2}}", AS_WRITTEN),
    (rf"(?:{DIGIT}{{1,4}}[- \xa0])?{DIGIT}{{1,4}}\\?/{DIGIT}{{1,4}}", AS_WRITTEN),
    (rf"{DIGIT}{{1,2}}[-/]{DIGIT}{{1,2}}[-/]{DIGIT}{{2,4}}", AS_WRITTEN),
    # telephone numbers
    (rf"\({DIGIT}{{2,3}}\){BLANK}?{DIGIT}{{3,4}}[- \xa0]?{DIGIT}{{3,5}}", RESPELLED),
    (
        rf"(?:\+\+?)?(?:{DIGIT}{{2,4}}[- \xa0])?{DIGIT}{{2,4}}[- \xa0]{DIGIT}{{3,4}}[- \xa0]?{DIGIT}{{3,5}}",
        AS_WRITTEN,
    ),
    (rf"(?:(?:\+\+?)?{DIGIT}{{2,4}}\.)?{DIGIT}{{2,4}}\.{DIGIT}{{3,4}}\.{DIGIT}{{3,5}}", AS_WRITTEN),
    # names with signs in them, addresses, markup
    (rf"{COMPANY}|[A-Z]+\$|[cC]\+\+|[cCfF]#", AS_WRITTEN),
    (rf"(?:{ASCII}+\.)+(?ai:{FILE_TYPES})(?=[\s.,!?]|$)", AS_WRITTEN),
    (r"(?ai:https?://)[^\s\"<>|(){}]+[^\s\"<>|.!?(){},-]", AS_WRITTEN),
    (HOST, AS_WRITTEN),
    (rf"{HOST}/[^\s\"<>|()]+[^\s\"<>|.!?(){{}},-]", AS_WRITTEN),
    (rf"(?:<|&lt;)?{ASCII}{IN_EMAIL}*@(?:[^\s\"<>|(){{}}.]+\.)*[^\s\"<>|(){{}}.]+(?:>|&gt;)?", AS_WRITTEN),
    (r"@[a-zA-Z_][a-zA-Z_0-9]*", AS_WRITTEN),
    (rf"#{LETTER}+", AS_WRITTEN),
    (MARKUP, AS_WRITTEN),
    # faces
    (r"([<>]?[:;=][-o*']?[DPpd|@{\[\]O\\]|:3)(?![A-Za-z0-9])", AS_WRITTEN),
    (r"([<>]?[:;=][-o*']?[()])(?![A-Za-z0-9])", RESPELLED),
    (rf"{EYE}_{EYE}|[oO][.'][oO]", AS_WRITTEN),
    (rf"\({EYE}(?:[_.]|(?<!-)-)?{EYE}\)", RESPELLED),
    # brackets in captions that are tokenized already
    (r"-(?ai:[lr][rcs]b)-", AS_WRITTEN),
    # entities, runs of marks, and single characters
    (r"(?ai:&(?:amp|lt|gt|quot|nbsp|apos|mdash|ndash);)", RESPELLED),
    (rf"&#\d+;|(?:{LETTER}|{DIGIT})*(?:&[aeiouAEIOU](?ai:acute|grave|uml);(?:{LETTER}|{DIGIT})*)+", AS_WRITTEN),
    (r"[!?]+|\*+|\\\*|#+|_+|-{5,}|@+|<<?|>>?|[²³¹⁰⁴-⁹]+|[₀-₉]+", AS_WRITTEN),
    (r"-{1,4}|\.{3,5}|''?|[`‘‛‹’›“«”»‚„‟\x91-\x94]{1,2}", RESPELLED),
    (r"[!-/:-@\[-`{-~§–—―…€¤₠£¢¼½¾⅓⅔\x80\x85\x96\x97]", RESPELLED),
]

# Only here does a token, or what its rule looks ahead at, hold a blank: markup, fractions, telephone numbers, "No. 5", "B. She".
# (One class of characters in front lets the search run over most captions without a stop.)
SPANS_BLANK = re.compile(r"[<\d).](?:(?<=<)|(?<!<)\s+[\d(]|(?<=\b[A-Za-z]\.)\s)")
# The same as flags of pieces between blanks: HOLDS_SPAN suffices, ENDS_SPAN needs a next piece that has BEGINS_SPAN.
HOLDS_SPAN, ENDS_SPAN, BEGINS_SPAN = 1, 2, 4
SINGLE_LETTER = re.compile(r"\b[A-Za-z]\.$")

# What a following caption may change: a single letter, or "No.", at the end.
ENDS_OPEN = re.compile(rf"(?:(?<![^\W_])[A-Za-z]|(?<![^\W_])(?ai:{NUMBERED}))\.\s*$")

LONE_MARKS = frozenset(".,;:!?'\"")  # of which nothing is left
TWO_WORDS = frozenset(["cannot", "gonna", "wanna", "gotta", "lemme", "gimme"])
# Nearly all words: letters that no rule splits, hyphens and a genitive, at most one mark behind, and no abbreviation.
SIMPLE_WORD = re.compile(r"([A-Za-z]+(?:-[A-Za-z]+)*)('s)?[.,!?]?")
ABBREVIATION = rf"(?ai:{CLOSING}|{TITLES}|{STATES}|[a-z]|m[ft]g|p?pt[ey]s?)\."


@lru_cache(maxsize=1)
def _compiled_rules() -> list[tuple[re.Pattern, bool]]:
    """Compiled when a caption first needs them: nearly all words are told by the simpler rules of `split_piece`."""
    return [(re.compile(pattern), spelling) for pattern, spelling in RULES]


def _lex(text: str, following: str = "") -> list[str]:
    """Split a text into tokens; `following` is not split, but rules may look ahead into it."""
    tokens, start, rules = [], 0, _compiled_rules()
    reduced = reduce_characters(f"{text}\n{following}" if following else text)
    while start < len(text):
        longest, end, spelling = start, start + 1, None
        for rule, rule_spelling in rules:
            match = rule.match(reduced, start)
            if match and match.end() > longest:
                longest, end, spelling = match.end(), match.end(match.lastindex or 0), rule_spelling
        # a character that no rule knows, such as an emoji, ends the token before it and leaves nothing
        if spelling is not None:
            token = _spell(text[start:end], spelling)
            if token and token not in PUNCTUATION:
                tokens.append(token)
        start = end
    return tokens


def _spell(token: str, spelling: bool) -> str:
    token = token.lower().replace("\xad", "").replace(" ", "\xa0")
    if "/" not in token and "@" not in token:  # in addresses it stays
        token = token.replace("&amp;", "&")
    if spelling == AS_WRITTEN:
        return token
    return RUNS.get(token) or ENTITIES.get(token, token.replace("&apos;", "'").translate(SPELLING))


@lru_cache(maxsize=1 << 17)
def split_piece(piece: str) -> tuple[tuple[str, ...], int]:
    """Split text that stands between two blanks: its words, and flags that say whether one may reach into the next piece."""
    if piece.isascii() and piece.isalpha() and (word := piece.lower()) not in TWO_WORDS:
        return (word,), 0
    if piece in LONE_MARKS:
        return (), ENDS_SPAN * (piece == ".")
    if (simple := SIMPLE_WORD.fullmatch(piece)) and piece.rstrip(".,!?").lower() not in TWO_WORDS:
        word, genitive = simple.groups()
        words = (word.lower(), genitive) if genitive else (word.lower(),)
        if piece[-1] != ".":
            return words, 0
        if not re.fullmatch(ABBREVIATION, piece):
            return words, ENDS_SPAN
    flags = HOLDS_SPAN * bool("<" in piece or SINGLE_LETTER.search(piece))
    flags |= ENDS_SPAN * (piece[-1] in ")." or piece[-1].isdecimal())
    flags |= BEGINS_SPAN * (piece[0] == "(" or piece[0].isdecimal())
    return tuple(_lex(piece)), flags


def tokenize(caption: str) -> list[str]:
    """Split one caption into its words, in lower case, without punctuation.

    A word may hold a no-break space: a fraction ("1 1/2"), a telephone number or a piece of markup is one token.
    """
    if SPANS_BLANK.search(caption):
        return _lex(" ".join(caption.splitlines()))
    return [word for piece in caption.split() for word in split_piece(piece)[0]]


def tokenize_in_order(captions: Sequence[str]) -> list[list[str]]:
    """Split captions as coco-caption does, bit for bit: each may be read with the beginning of the next one.

    There "letter B." ends in the word "b" if the next caption begins with "A", "The" or another word that begins sentences, and
    in "b." otherwise, so that a score depends on the order of the images.
    """
    tokens, following = [], ""
    for caption in reversed(captions):
        line = " ".join(caption.splitlines())
        tokens.append(_lex(line, following) if ENDS_OPEN.search(line) else tokenize(caption))
        following = f"{line}\n{following}" if not line.strip() else line
    return tokens[::-1]
