"""A comparison as one HTML file that a person reads and marks: no server, no network, nothing but this file.

All text is escaped. The one script is named by its SHA-256 in the page's content security policy, which also forbids
every request: text of a data set or a model can neither run nor fetch anything. Marks are kept by the browser under a
digest of the content, and exported as JSON. With the names hidden, each record's two answers are in an order of its
own, which the digest decides.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from modelscope_dolly.compare.answers import ModelAnswer
from modelscope_dolly.compare.held_out import HeldOutRecord
from modelscope_dolly.compare.side_by_side import Comparison

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --chosen: #2a7; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
header { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid var(--line); padding: .5rem 0; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.answers { display: flex; gap: 1rem; flex-wrap: wrap; }
.answers > section { flex: 1 1 20rem; border-left: 3px solid var(--line); padding-left: .75rem; }
.blind .swap .answers { flex-direction: row-reverse; }
.blind .name { display: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .25rem 0; }
button[aria-pressed=true] { outline: 3px solid var(--chosen); }
textarea { width: 100%; box-sizing: border-box; }
.facts { opacity: .7; font-size: .85rem; }
"""

_SCRIPT = """
"use strict";
const page = document.body, key = "dolly-compare-" + page.dataset.digest;
let marks = {};
try { marks = JSON.parse(localStorage.getItem(key)) || {}; } catch (error) { marks = {}; }
const names = [page.dataset.first, page.dataset.second];
const cards = [...document.querySelectorAll("article")];
function keep() {
  try { localStorage.setItem(key, JSON.stringify(marks)); }
  catch (error) { document.getElementById("state").textContent = "This browser keeps no marks: export them."; }
  show();
}
function show() {
  const counts = {};
  for (const card of cards) {
    const mark = marks[card.dataset.record] || {};
    for (const button of card.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.dataset.choice === mark.choice));
    if (mark.choice) counts[mark.choice] = (counts[mark.choice] || 0) + 1;
  }
  const done = Object.values(counts).reduce((sum, count) => sum + count, 0);
  const tally = [names[0] + " better " + (counts.first || 0), names[1] + " better " + (counts.second || 0),
                 "the same " + (counts.same || 0), "both bad " + (counts.bad || 0)].join(", ");
  document.getElementById("state").textContent =
    done + " of " + cards.length + " marked" + (page.classList.contains("blind") ? "" : ": " + tally);
}
for (const card of cards) {
  const number = card.dataset.record, note = card.querySelector("textarea");
  note.value = (marks[number] || {}).note || "";
  note.addEventListener("input", () => { marks[number] = {...marks[number], note: note.value}; keep(); });
  for (const button of card.querySelectorAll("button")) button.addEventListener("click", () => {
    const choice = (marks[number] || {}).choice === button.dataset.choice ? undefined : button.dataset.choice;
    marks[number] = {...marks[number], choice: choice}; keep();
  });
}
const blind = document.getElementById("blind");
blind.checked = page.classList.contains("blind");
blind.addEventListener("change", () => { page.classList.toggle("blind", blind.checked); show(); });
document.getElementById("export").addEventListener("click", () => {
  const rows = cards.map(card => ({record: Number(card.dataset.record),
    instruction: card.querySelector(".instruction").textContent, ...(marks[card.dataset.record] || {})}));
  const text = JSON.stringify({models: names, digest: page.dataset.digest, marks: rows}, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "marks.json"; link.click(); URL.revokeObjectURL(link.href);
});
show();
"""


def page(comparison: Comparison, blind: bool = False) -> str:
    """The whole file. `blind`: it opens with the names hidden."""
    first, second = map(_safe, comparison.names)
    digest = comparison.digest
    cards = [
        _card(number, record, pair, comparison.names, swap=int(digest[number % len(digest)], 16) % 2 == 1)
        for number, (record, pair) in enumerate(zip(comparison.records, comparison.pairs, strict=True), 1)
    ]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_source(_SCRIPT)}'; base-uri 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Two models, {len(cards)} instructions</title>
<style>{_STYLE}</style>
</head>
<body class="{"blind" if blind else ""}" data-digest="{digest}" data-first="{first}" data-second="{second}">
<header>
<strong class="name">{first} and {second}</strong>
<label><input type="checkbox" id="blind"> hide which is which</label>
<button type="button" id="export">Export marks</button>
<span id="state"></span>
</header>
<main>
{"".join(cards)}</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _card(
    number: int, record: HeldOutRecord, pair: tuple[ModelAnswer, ModelAnswer], names: tuple[str, str], swap: bool
) -> str:
    context = f"<details><summary>Context</summary><pre>{_safe(record.context)}</pre></details>\n"
    person = f"<details><summary>A person's answer</summary><pre>{_safe(record.response)}</pre></details>\n"
    sections = "".join(
        _section(answer, name, choice) for answer, name, choice in zip(pair, names, ("first", "second"), strict=True)
    )
    return f"""<article data-record="{number}"{' class="swap"' if swap else ""}>
<h2>{number}</h2>
<pre class="instruction">{_safe(record.instruction)}</pre>
{context if record.context else ""}{person if record.response else ""}<div class="answers">
{sections}</div>
<p><button type="button" data-choice="same">the same</button>
<button type="button" data-choice="bad">both are bad</button></p>
<textarea rows="1" placeholder="Note"></textarea>
</article>
"""


def _section(answer: ModelAnswer, name: str, choice: str) -> str:
    facts = [f"{answer.new_tokens} tokens", *(["cut"] if answer.finish_reason == "length" else [])]
    if answer.loss is not None:
        facts.append(f"loss of the person's answer {answer.loss / len(answer.ids):.4f} per token")
    return f"""<section>
<h3 class="name">{_safe(name)}</h3>
<pre>{_safe(answer.problem or answer.text)}</pre>
<p class="facts name">{_safe(", ".join(facts))}</p>
<button type="button" data-choice="{choice}">this one is better</button>
</section>
"""


def _safe(text: str) -> str:
    """Escaped for text and for attributes; what is no character of HTML is replaced."""
    return escape("".join(c if c in "\t\n" or c.isprintable() or c.isspace() else "\ufffd" for c in text), quote=True)


def _source(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"
