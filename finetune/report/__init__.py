"""Reports of runs and evaluations: report.md, report.html and README.md, made from files alone, without torch.

`read` collects a run directory, `content` turns an evaluation's results into titled parts, which `markdown` and `html`
(with its templates) render; `charts` draws SVG figures, `experts` and `survival` are sections of their own.
"""
