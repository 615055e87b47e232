"""The page of a report, as a Jinja template.

It stands in a module because the bundle that Flower sends carries code but no HTML. The page must open
without a network: no script, no font, no picture from elsewhere, and a policy in its head that forbids the
browser to fetch any. Every value is escaped by the engine; only the two pictures, which
`server.report.figures` made, are markup.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --wash: #f5f7fa; --ink: #18212f; --muted: #5a6678; --line: #dbe1ea;
  --federation: #0072b2; --public: #00795a; --sites: #b94f00; --pooled: #8d4379; --baseline: #7a6200;
  --gain: #00795a; --mixed: #8a6100; --none: #a53a1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #11161d; --wash: #1a212b; --ink: #e7ecf3; --muted: #9eabbc; --line: #313c4a;
    --federation: #5cb4f0; --public: #3ccaa2; --sites: #f3965a; --pooled: #e09acb; --baseline: #dcc04a;
    --gain: #3ccaa2; --mixed: #e5b84c; --none: #ff8f70;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial,
    sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.015em; margin: 0.2rem 0 1.4rem; }
h2 { font-size: 1.3rem; letter-spacing: -0.005em; margin: 3rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0 0 0.4rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.eyebrow, .note, .meaning, figcaption, caption { color: var(--muted); font-size: 0.88rem; }
.eyebrow { margin: 0; }
.verdict { border-left: 5px solid var(--tone); background: var(--wash); border-radius: 0 8px 8px 0;
  padding: 1rem 1.3rem; }
.verdict strong { display: block; font-size: 1.16rem; line-height: 1.35; margin-bottom: 0.4rem; }
.verdict p { margin: 0; max-width: none; }
.gain { --tone: var(--gain); } .mixed { --tone: var(--mixed); } .none { --tone: var(--none); }
.stopped { --tone: var(--none); margin-bottom: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.8rem, 1fr)); gap: 0.8rem;
  margin: 1.2rem 0 0; padding: 0; }
.tiles > div { display: flex; flex-direction: column; border: 1px solid var(--line); border-radius: 8px;
  padding: 0.7rem 1rem 0.8rem; }
.tiles dt { font-size: 0.93rem; font-weight: 600; }
.tiles dd { margin: 0; }
.tiles .value { order: -1; font-size: 1.55rem; font-weight: 650; letter-spacing: -0.01em; line-height: 1.3;
  }
figure { margin: 1rem 0 0.5rem; }
.picture { overflow-x: auto; }
.picture svg { display: block; width: 100%; min-width: 36rem; height: auto; }
.picture svg * { stroke-linejoin: round; stroke-linecap: butt; }
.picture svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
caption { text-align: left; padding-bottom: 0.4rem; }
th, td { text-align: left; vertical-align: top; padding: 0.45rem 1rem 0.45rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; font-size: 0.85rem;
  border-bottom: 1.5px solid var(--muted); vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 8rem; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
.scores tbody th { width: 50%; }
.federation th, .federation td { font-weight: 700; }
.federation .meaning { font-weight: 400; }
.single th { padding-left: 1.4rem; color: var(--muted); font-weight: 400; }
.meaning { display: block; font-weight: 400; }
.key { display: inline-block; width: 0.62em; height: 0.62em; margin-right: 0.55em; border-radius: 2px;
  background: var(--colour); }
.k-public { --colour: var(--public); } .k-sites { --colour: var(--sites); }
.k-baseline { --colour: var(--baseline); }
.k-federation { --colour: var(--federation); border-radius: 50%; } .k-pooled { --colour: var(--pooled); }
.promises { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem;
  margin-top: 0.8rem; }
.promises > div { background: var(--wash); border-radius: 8px; padding: 1rem 1.2rem; }
.promises ul { margin: 0; padding-left: 1.1rem; }
.promises li { margin: 0.45rem 0; }
details { border-top: 1px solid var(--line); padding: 0.6rem 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 600; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 0.9em; overflow-wrap: anywhere; }
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --wash: #f5f7fa; --ink: #18212f; --muted: #5a6678; --line: #dbe1ea;
    --federation: #0072b2; --public: #00795a; --sites: #b94f00; --pooled: #8d4379; --baseline: #7a6200;
    --gain: #00795a; --mixed: #8a6100; --none: #a53a1f;
  }
  html { font-size: 12px; }
  main { max-width: none; padding: 0; }
  .picture svg { min-width: 0; }
  figure, .tiles, .verdict, .scroll, tr, .promises > div { break-inside: avoid; }
  h2 { break-after: avoid; }
  details:not([open])::details-content { display: block; content-visibility: visible; }
}
"""

BODY = """
{% macro col(name) %}<th scope="col">{{ name }}</th>{% endmacro %}
{% macro num(name) %}<th scope="col" class="n">{{ name }}</th>{% endmacro %}
{% macro cell(value) %}<td>{{ value }}</td>{% endmacro %}
{% macro figure(value) %}<td class="n">{{ value }}</td>{% endmacro %}
{% macro row(name) %}<th scope="row">{{ name }}</th>{% endmacro %}
{% set headline = summary.headline_metric %}
{% set repetitions = seeds|counted('repetition') %}
{% set unit = costliest.unit if costliest else 'record' %}
<main>
<header>
<p class="eyebrow">{{ facts|join(' · ') }}</p>
<h1>What {{ summary.sites|length|counted('site') }} learned together</h1>
{% if summary.status == 'incomplete' %}
<div class="verdict stopped"><strong>This run stopped before its end.</strong>
<p>{{ (summary.incomplete_because or 'The reason was not recorded.')|plain(300) }}
The numbers below are of the {{ summary.rounds|counted('round') }} that were finished;
the privacy loss is that of the whole plan.</p></div>
{% endif %}
<div class="verdict {{ verdict.tone }}"><strong>{{ verdict.headline }}</strong>
<p>{{ verdict.sentences|join(' ') }}</p></div>
<dl class="tiles">
{% for tile in tiles %}
<div><dt>{{ tile.name }}</dt><dd class="value">{{ tile.value }}</dd>
<dd class="note">{{ tile.note }}</dd></div>
{% endfor %}
</dl>
</header>

<section>
<h2>What was gained</h2>
<p>Each row is one way to a model. All are scored on the same
{% if summary.public %}{{ summary.public.test|counted('public test case') }}{% else %}public test
cases{% endif %}.
{% for meaning in meanings %}{{ meaning }} {% endfor %}Scores are shown times 100.</p>
<figure>
<div class="picture" role="img" aria-label="{{ contenders.alt }}">{{ contenders.svg }}</div>
<figcaption>
{%- if seeds > 1 %}The large mark is the mean, the bar one standard deviation over {{ repetitions }}, the
small dots the repetitions.
{% endif %}
The dashed line marks the federation.
{%- if contenders.off_scale %} A triangle at the left edge stands for a site that lies beyond it.{% endif %}
{%- if seeds > 1 %} Bars may overlap although one way is always better, because all share the luck of a
repetition; the last column of the table compares repetition by repetition and says in how many the sign was
the same.
{%- endif %}</figcaption>
</figure>
<div class="scroll"><table class="scores">
<caption>Scores times 100{% if seeds > 1 %}, mean ± standard deviation over
{{ repetitions }}{% endif %}</caption>
<thead><tr>{{ col('Way to a model') }}{% for metric in metrics %}{{ num(metric|metric_name) }}{% endfor %}
<th scope="col" class="n">Federation minus this,<br>{{ headline|metric_name }} points</th></tr></thead>
<tbody>
{% for one in score_rows %}
<tr class="{{ 'federation' if one.line.is_federation }} {{ 'single' if one.line.is_single_site }}">
<th scope="row">
{%- if not one.line.is_single_site %}<span class="key k-{{ one.line.kind }}"></span>{% endif %}
{{ one.line.name }}
{% if one.line.meaning %}<span class="meaning">{{ one.line.meaning }}</span>{% endif %}</th>
{% if one.line.metrics %}
{% for score in one.scores %}{{ figure(score) }}{% endfor %}{{ figure(one.gap) }}
{% else %}
<td colspan="{{ metrics|length + 1 }}" class="note">{{ one.line.absent }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody></table></div>
</section>

{% if rounds %}
<section>
<h2>Round by round</h2>
<figure>
<div class="picture" role="img" aria-label="{{ rounds.alt }}">{{ rounds.svg }}</div>
<figcaption>The federation's {{ headline|metric_name }} after each round
{%- if seeds > 1 %} (mean; the band holds all {{ repetitions }}){% endif %}, beside what other ways reached.
Below: the largest ε that any site had spent by then.</figcaption>
</figure>
</section>
{% endif %}

<section>
<h2>What it cost in privacy</h2>
{% if costliest %}
<p>What leaves a site is what its model thinks of public cases, and that model was trained under differential
privacy. ε measures what this can reveal about any one {{ unit }}. The largest ε here is
{{ costliest.epsilon|at_most }}. It means that a test which wrongly points at 1 of 100 outsiders, on seeing
all that a site sent, rightly points at no more than {{ (costliest|recognised * 100)|at_most }} of 100 whose
{{ 'record' if unit == 'record' else 'records' }} took part.</p>
<div class="scroll"><table>
<caption>Privacy spent by each site</caption>
<thead><tr>{{ col('Site') }}{{ num('ε') }}{{ num('δ') }}{{ col('Unit') }}{{ col('Adjacency') }}
{{ col('Accountant') }}{{ col('Horizon') }}{% if with_noise %}{{ num('Noise σ') }}{{ num('Clip') }}{% endif %}
</tr></thead>
<tbody>
{% for line in summary.privacy %}
<tr>{{ row(line.site|plain) }}{{ figure(line.epsilon|at_most) }}{{ figure(line.delta|delta) }}
{{ cell(line.unit|unit) }}{{ cell(line.adjacency|adjacency) }}{{ cell(line|accountant) }}
{{ cell(line.horizon|horizon) }}
{% if with_noise %}
{{ figure('–' if line.noise_multiplier is none else '%.3g' % line.noise_multiplier) }}
{{ figure('–' if line.clipping_norm is none else '%.3g' % line.clipping_norm) }}
{% endif %}
</tr>
{% endfor %}
</tbody></table></div>
{% for sites, sentence in guarantees %}
<p class="note">In full, for {{ sites }}: {{ sentence }}</p>
{% endfor %}
{% if seeds > 1 %}
<p class="note">The {{ repetitions }} are independent simulations, each with a ledger of its own; ε is that
of the costliest one. To repeat a run on the same patients would cost every time.</p>
{% endif %}
{% else %}
<p>No private record was read in this run.</p>
{% endif %}
</section>

<section>
<h2>What it cost in messages</h2>
<div class="scroll"><table>
<caption>What a site sent</caption>
<thead><tr>{{ col('') }}{{ num('A round, on average') }}{{ num('A round, at most') }}
{{ num(summary.rounds|counted('round')) }}</tr></thead>
<tbody>
{% for name, bytes in traffic %}
<tr>{{ row(name) }}{{ figure(bytes.mean|size) }}{{ figure(bytes.max|size) }}
{{ figure((bytes.mean * summary.rounds)|size) }}</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Time {{ summary.seconds|duration }}{% if seeds > 1 %} for all {{ repetitions }}{% endif %},
peak memory {{ '{:,.0f}'.format(summary.peak_memory_mib) }} MiB.</p>
</section>

<section>
<h2>Who took part</h2>
<div class="scroll"><table>
<caption>Sites, the sizes that they declared in public (not their true numbers of cases), and the rounds
that they answered</caption>
<thead><tr>{{ col('Site') }}{{ num('Declared size') }}
{{ num('Rounds answered' if seeds == 1 else 'Rounds answered, all repetitions') }}</tr></thead>
<tbody>
{% for one in attendance %}
<tr>{{ row(one.site) }}{{ figure(one.declared_size) }}{{ figure(one.answered) }}</tr>
{% endfor %}
</tbody></table></div>
{% if absences %}
<div class="scroll"><table>
<caption>Who was left out, and why</caption>
<thead><tr>{{ col('Site') }}{{ col('Reason') }}{{ col('Rounds') }}</tr></thead>
<tbody>
{% for absence in absences %}
<tr>{{ row(absence.site) }}{{ cell(absence.reason) }}{{ cell(absence.when) }}</tr>
{% endfor %}
</tbody></table></div>
{% if more_absences %}<p class="note">{{ more_absences }} more in summary.json.</p>{% endif %}
{% elif summary.history %}
<p>Nobody was left out of any round.</p>
{% endif %}
</section>

<section>
<h2>Which cases are public</h2>
{% if summary.public %}
<p>Everybody sees {{ summary.public.proxy|counted('proxy case') }}, which the models talk about
({{ '{:,}'.format(summary.public.proxy_labelled) }} of them labelled),
{% if summary.public.validation %}{{ summary.public.validation|counted('validation case') }}, by which
choices are made,{% endif %} and {{ summary.public.test|counted('test case') }}, on which every score of
this report was measured.</p>
{% if summary.public.by_assumption %}
<p><strong>They are public by assumption.</strong> They are a random part of the same collection that the
sites' records come from. No hospital could take that for granted: a real federation needs cases that may be
shown to everyone, and if those come from elsewhere or from other patients, expect lower scores.</p>
{% else %}
<p>Whoever set up this run declared them public. No privacy mechanism protects them.</p>
{% endif %}
{% else %}
<p>The sizes of the public parts were not recorded. No privacy mechanism protects public cases.</p>
{% endif %}
</section>

<section>
<h2>What this does and does not promise</h2>
<div class="promises">
<div><h3>It does</h3><ul>
<li>The ε above hold against everyone who sees what a site sent, whatever else they know and whatever they
do with it later.</li>
<li>Each ε is that of the whole plan, set aside before the first record was read. It is reported in full
even if a run ends early.</li>
<li>Every contender was scored on the same public test cases, which no model was trained on.</li>
</ul></div>
<div><h3>It does not</h3><ul>
<li><strong>It is no verdict on compliance.</strong> Whether a law, an ethics board or a hospital's rules are
satisfied is for people to decide.</li>
<li><strong>A site's mix of labels is not hidden.</strong> Privacy here is for each {{ unit }}, not for
facts about a hospital as a whole, such as how common a disease is there.</li>
<li><strong>A patient at two sites counts at each</strong>: what the two can reveal adds up.</li>
{% if unit == 'record' %}
<li><strong>The unit is a record.</strong> A patient with k records can be revealed up to k times as much
(k·ε).</li>
{% endif %}
<li>That a site took part, and the size that it declared, are known to all.</li>
<li>Scores on test cases say nothing about use at the bedside: this is no clinical validation.</li>
{% if summary.simulated %}
<li><strong>This was a simulation</strong>: all records lay on one machine and nobody was protected by it.
It shows what a federation would gain and cost.</li>
{% endif %}
</ul></div>
</div>
</section>

<section>
<h2>Details</h2>
<details><summary>{{ headline|metric_name }} of every repetition</summary>
<div class="scroll"><table>
<thead><tr>{{ col('Seed') }}{% for seed in summary.seeds %}{{ num(seed) }}{% endfor %}</tr></thead>
<tbody>
{% for one in score_rows if one.line.metrics and headline in one.line.metrics %}
<tr>{{ row(one.line.name) }}
{% for value in one.line.metrics[headline]['values'] %}{{ figure('%.1f' % (value * 100)) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div></details>
{% if summary.run_config %}
<details><summary>Run configuration</summary>
<div class="scroll"><table>
<thead><tr>{{ col('Key') }}{{ col('Value') }}</tr></thead>
<tbody>
{% for name, value in summary.run_config.items() %}
<tr><th scope="row"><code>{{ name|plain }}</code></th><td><code>{{ value|string|plain(300) }}</code></td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
{% if provenance %}
<details><summary>Provenance</summary>
<div class="scroll"><table>
<thead><tr>{{ col('What') }}{{ col('Which') }}</tr></thead>
<tbody>
{% for name, value in provenance %}
<tr>{{ row(name) }}<td><code>{{ value|plain(300) }}</code></td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
</section>
</main>
"""


def whole_page(title: str, body: str) -> str:
    """Put a body into a page that opens offline; both are templates."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>{body}</body>
</html>
"""


PAGE = whole_page("Grand Rounds report: {{ summary.scenario|plain }}", BODY)
