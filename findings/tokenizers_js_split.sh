#!/usr/bin/env bash
# @huggingface/tokenizers 0.2.0 (JavaScript, npm) beside tokenizers 0.23.3 (Python).
#
# Expected: one tokenizer.json gives the same ids in both. Its pre-tokenizer says what becomes of a separator: Split
# with "removed" drops it, "merged_with_previous" glues it to the word before, Punctuation with "removed" drops it.
# Seen: JavaScript keeps the separator as a piece of its own in all three cases. Split on a *string* " " with
# "removed" gives an unknown token for each space; the same Split on a *regex* " " is right.
# For users: a word-level captioner exported for the browser reads every prompt with an unknown token between words,
# with no error. Use WhitespaceSplit or a regex in the file, and compare ids with Python before shipping.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3
npm install --silent --no-audit --no-fund --prefix "$work" @huggingface/tokenizers@0.2.0 >/dev/null

cat > encode.mjs <<'JS'
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
const tokenizer = new Tokenizer(JSON.parse(readFileSync("tokenizer.json")), { unk_token: "<unk>" });
console.log(JSON.stringify(tokenizer.encode(process.argv[2]).ids));
JS

venv/bin/python - <<'PY'
import json
import subprocess

from tokenizers import Regex, Tokenizer, models, pre_tokenizers


def ids(pre_tokenizer, text):
    """Token ids of `text` in Python and in JavaScript."""
    vocabulary = {"<unk>": 0, "a": 1, "bus": 2, ",": 3, "a,": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.save("tokenizer.json")
    return tokenizer.encode(text).ids, json.loads(subprocess.check_output(["node", "encode.mjs", text]))


split_string = ids(pre_tokenizers.Split(" ", "removed"), "a bus")
split_regex = ids(pre_tokenizers.Split(Regex(" "), "removed"), "a bus")
merged = ids(pre_tokenizers.Split(",", "merged_with_previous"), "a,bus")
punctuation = ids(pre_tokenizers.Punctuation("removed"), "a,bus")
assert split_regex == ([1, 2], [1, 2]), split_regex
assert split_string == ([1, 2], [1, 0, 2]), split_string
assert merged == ([4, 2], [1, 3, 2]), merged
assert punctuation == ([1, 2], [1, 3, 2]), punctuation
print(f"'a bus' split on ' ' and removed: ids {split_string[0]} in Python, {split_string[1]} in JavaScript")
PY
