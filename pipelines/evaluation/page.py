"""The report's frame: its skeleton, its style and its few lines of script; nothing is fetched from anywhere."""

from string import Template

SKELETON = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="$policy">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header class="page">
<p class="eyebrow">codecmill evaluation</p>
<h1>$heading</h1>
<p class="lead">$lead</p>
</header>
<main>
<section aria-label="Summary"><dl class="tiles">$tiles</dl></section>
<div class="pair">
<section aria-labelledby="distribution"><h2 id="distribution">Distribution</h2>$chart</section>
<section aria-labelledby="origin"><h2 id="origin">Where it comes from</h2><dl class="origin">$origin</dl></section>
</div>
$curves
$pictures
$broken
<section aria-labelledby="all"><h2 id="all">All images</h2>$table</section>
</main>
<footer>$notes</footer>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d2126; --soft: #5b636d; --rule: #dfe1e3; --accent: #0b6e63; --bar: #7fb5ad;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1b1e22; --ink: #e8eaed; --soft: #a3abb5; --rule: #32373d;
    --accent: #6fd0c2; --bar: #3f7f77;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: clamp(1rem, 3vw, 2.5rem); max-width: 78rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; font-weight: 650; }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; font-weight: 650; }
h3 { margin: 0; font-size: 1rem; font-weight: 600; }
h1, h3, td, dd, li { overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: .15em; }
a:focus-visible, button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
code { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
section { margin-top: 2.5rem; }
.page .eyebrow { margin: 0 0 .35rem; color: var(--accent); font-size: .85rem; font-weight: 600; }
.lead { margin: .5rem 0 0; color: var(--soft); }
.lead bdi { display: inline-block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: .6rem; overflow: hidden; }
.tiles div { padding: .9rem 1rem; background: var(--card); }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles dd small { font-size: .9rem; font-weight: 400; letter-spacing: 0; }
.tiles dd + dd { font-size: .85rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.pair { display: grid; gap: 0 3rem; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
svg { display: block; width: 100%; height: auto; font-size: 13px; }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--rule); }
svg .bar { fill: var(--bar); }
svg .stroke { stroke: var(--ink); stroke-width: 1.5; opacity: .55; }
svg line.mean { stroke: var(--accent); stroke-width: 2; stroke-dasharray: 5 4; }
svg text.mean { fill: var(--accent); font-weight: 600; }
svg .curve { fill: none; stroke: var(--line); stroke-width: 1.75; }
svg .curve circle { fill: var(--line); stroke: none; }
svg text.curve { fill: var(--line); stroke: none; font-weight: 600; }
svg .curve-0 { --line: var(--accent); stroke-width: 3; }
svg .curve-1 { --line: #a8662a; }
svg .curve-2 { --line: #4a78c2; }
svg .curve-3 { --line: #a2508f; }
svg .curve-4 { --line: #74787d; }
.pieces { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; }
.pieces img { display: block; width: 100%; height: auto; border-radius: .25rem; image-rendering: pixelated; }
.origin { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .4rem 1.25rem; margin: 0;
  font-size: .92rem; }
.origin dt { color: var(--soft); }
.origin dd { margin: 0; }
.heading { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: .25rem 1.5rem; }
.heading p { margin: 0 0 .75rem; color: var(--soft); font-size: .92rem; }
.switch { display: none; gap: .35rem; }
.scripted .switch { display: flex; margin: 0 0 .75rem; }
.switch button { padding: .35rem .8rem; border: 1px solid var(--rule); border-radius: 2rem; background: none;
  color: inherit; font: inherit; font-size: .88rem; cursor: pointer; min-height: 2.25rem; }
.switch button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--card); }
.card { margin: 0 0 1.25rem; padding: 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .6rem; }
.card header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .1rem 1.5rem;
  margin-bottom: .75rem; }
.card header p { margin: 0; color: var(--soft); font-size: .92rem; font-variant-numeric: tabular-nums; }
.card header strong { color: var(--ink); }
.views { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .75rem; align-items: start; }
.compare { display: grid; grid-column: span 2; grid-template-columns: subgrid; position: relative; }
figure { margin: 0; }
figcaption { margin-top: .3rem; color: var(--soft); font-size: .85rem; }
figure a { display: block; }
.views img { display: block; width: var(--shown); max-width: 100%; height: auto; border-radius: .25rem; }
.views img.tiny { image-rendering: pixelated; }
.compare input, .handle { display: none; }
.files { margin: .75rem 0 0; font-size: .85rem; color: var(--soft); }
.files a { display: inline-block; padding: .15rem 0; margin-right: .6rem; }
.slide .wide { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.25rem; }
.slide .wide .compare { --cut: 50%; grid-column: auto; display: grid; grid-template-columns: minmax(0, 1fr);
  width: var(--shown); max-width: 100%; }
.slide .wide .compare > * { grid-area: 1 / 1; }
.slide .wide .compare .reconstruction img { clip-path: inset(0 0 0 var(--cut)); }
.slide .wide .compare .reconstruction figcaption { text-align: right; }
.slide .wide .handle { display: block; position: absolute; z-index: 1; inset: 0 auto 1.6rem var(--cut); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / .45); pointer-events: none; }
.slide .wide .handle::after { content: "\\2194"; position: absolute; top: 50%; left: 50%; translate: -50% -50%;
  width: 1.9rem; height: 1.9rem; border-radius: 50%; background: #fff; color: #1d2126; display: grid;
  place-items: center;
  box-shadow: 0 0 0 1px rgb(0 0 0 / .35); }
.slide .wide .compare input { display: block; z-index: 2; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.slide .wide .compare input:focus-visible + .handle { outline: 3px solid var(--accent); outline-offset: 1px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: middle; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td bdi { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
td.thumbnail { width: 3.75rem; }
td.thumbnail img { display: block; width: 3rem; height: 2.25rem; object-fit: cover; border-radius: .2rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .85rem; }
footer p { max-width: 46rem; margin: 0 0 .5rem; }
@media (max-width: 52rem) {
  .pair, .slide .wide { grid-template-columns: minmax(0, 1fr); }
  svg { font-size: 19px; }
}
@media (max-width: 40rem) {
  .wide { grid-template-columns: minmax(0, 1fr); }
  .wide .compare { grid-column: auto; grid-template-columns: minmax(0, 1fr); gap: .75rem; }
  .card { margin-inline: -.5rem; padding: .75rem; }
  .origin { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .origin dd { margin-bottom: .5rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .views, .slide .wide { gap: .75rem; }
  .place, .size { display: none; }
  th { white-space: normal; }
}
@media print { body { background: none; } .card { break-inside: avoid; } .switch { display: none !important; } }
"""

SCRIPT = """
const page = document.documentElement;
const buttons = [...document.querySelectorAll(".switch button")];
const show = (slide) => {
  page.classList.toggle("slide", slide);
  for (const button of buttons) button.setAttribute("aria-pressed", String((button.value === "slide") === slide));
};
for (const button of buttons) button.addEventListener("click", () => show(button.value === "slide"));
for (const input of document.querySelectorAll(".compare input")) {
  const move = () => input.parentElement.style.setProperty("--cut", input.value + "%");
  input.addEventListener("input", move);
  move();
}
page.classList.add("scripted");
show(matchMedia("(max-width: 40rem)").matches);
"""
