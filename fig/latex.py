"""Markdown tables as LaTeX: what table.md says, for a paper."""

import re

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
           ">": r"\textgreater{}", "|": r"\textbar{}", **{c: "\\" + c for c in "&%$#_{}"}}
NUMBER = re.compile(r"[-+]?\d.*|-|")


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(character, character) for character in text)


def latex(text: str) -> str:
    """Markdown with tables below their titles -> a booktabs table each, numbers to the right, other text around them.

    Rows whose first cells differ stand a little apart.
    """
    found, rows, title = [r"% In the preamble: \usepackage{booktabs}"], [], ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            found += one_table(title, rows[0], rows[2:])  # below the first is Markdown's rule
            rows, title = [], ""
        if line:
            found += [f"% {title}"] * bool(title)
            title = line
    return "\n".join([*found, *[f"% {title}"] * bool(title), ""])


def one_table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    columns = ["r" if all(NUMBER.fullmatch(cell) for cell in column) else "l" for column in zip(*rows, strict=True)]
    lines, before = [], None
    for row in rows:
        lines += [r"\addlinespace"] * (before not in (None, row[0]))
        lines.append(" & ".join(map(escape, row)) + r" \\")
        before = row[0]
    return [r"\begin{table}", r"\centering", rf"\caption{{{escape(title)}}}",
            rf"\begin{{tabular}}{{{''.join(columns)}}}", r"\toprule", " & ".join(map(escape, header)) + r" \\",
            r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
