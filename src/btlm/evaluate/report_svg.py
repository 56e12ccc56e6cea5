"""Charts of a report as SVG: they need no script, take the colors of the page, and every mark tells its value."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 64, 16, 14, 46
_SHAPES = 4


@dataclass(frozen=True)
class Series:
    """A line, or a row of marks.

    Args:
        label: Its name.
        x, y: Places.
        low, high: Ends of a band or of error bars, or nothing.
        dash: Number of its kind of line: solid, dashed, dotted.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dash: int = 0


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of parts.

    Args:
        label: Its name.
        parts: Sizes, by the name of each part.
        shown: What stands at its end.
    """

    label: str
    parts: dict[str, float]
    shown: str


@dataclass
class _Drawing:
    height: int
    title: str
    marks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img" aria-label="{escape(self.title)}">'
        return "\n".join((head, *self.marks, "</svg>"))

    def add(self, mark: str, told: str = "", **attributes: object) -> None:
        given = " ".join(f'{name.replace("_", "-").rstrip("-")}="{value}"' for name, value in attributes.items())
        self.marks.append(f"<{mark} {given}>" + (f"<title>{escape(told)}</title>" if told else "") + f"</{mark}>")

    def text(self, x: float, y: float, words: str, anchor: str = "middle", **more: object) -> None:
        given = "".join(f' {name.rstrip("_")}="{value}"' for name, value in more.items())
        self.marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{given}>{escape(words)}</text>')


def ticks(low: float, high: float, number: int = 6) -> list[float]:
    """Round numbers between two ends, at least two."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / number))
    step = next(step * by for by in (1, 2, 2.5, 5, 10, 20) if (high - low) / (step * by) <= number)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as short as it can be."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.6g}"


def lines(
    series: Sequence[Series], *, title: str, x: str, y: str, mark: tuple[float, str] | None = None, height: int = 340
) -> str:
    """Lines with bands.

    Args:
        series: The lines.
        title: What the chart shows, for readers of screens.
        x, y: Names of the axes.
        mark: Place and name of a vertical line.
        height: Height of the drawing, which is 720 wide.
    """
    drawing = _Drawing(height, title)
    ends = [
        value for one in series for values in (one.y, one.low, one.high) for value in values if math.isfinite(value)
    ]
    across = [value for one in series for value in one.x]
    low, high, right = min(ends), max(ends), max(across)
    low, high = low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)

    def at_x(value: float) -> float:
        return _LEFT + value / right * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (height - _TOP - _BOTTOM)

    for tick in ticks(low, high):
        drawing.add("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{at_y(tick):.1f}", y2=f"{at_y(tick):.1f}", class_="grid")
        drawing.text(_LEFT - 6, at_y(tick) + 4, number(tick), "end")
    for tick in ticks(0, right):
        drawing.text(at_x(tick), height - _BOTTOM + 18, number(tick))
    if mark is not None and mark[0] < right:
        drawing.add(
            "line", x1=f"{at_x(mark[0]):.1f}", x2=f"{at_x(mark[0]):.1f}", y1=_TOP, y2=height - _BOTTOM, class_="mark"
        )
        drawing.text(at_x(mark[0]) + 4, _TOP + 10, mark[1], "start")
    for i, one in enumerate(series):
        color = f"c{i % 8}"
        if len(one.low) and all(map(math.isfinite, (*one.low, *one.high))):
            there = [f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(one.x, one.high, strict=True)]
            back = [f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(one.x, one.low, strict=True)]
            drawing.add("polygon", points=" ".join(there + back[::-1]), class_=f"band {color}")
        points = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(one.x, one.y, strict=True))
        drawing.add("polyline", points=points, class_=f"line {color} d{one.dash % 3}")
        if len(one.x) <= 64:
            for a, b in zip(one.x, one.y, strict=True):
                drawing.add(
                    "circle",
                    f"{one.label}: {b:.4g} at {number(a)}",
                    cx=f"{at_x(a):.1f}",
                    cy=f"{at_y(b):.1f}",
                    r=4,
                    class_=color,
                )
    drawing.text((_LEFT + _WIDTH) / 2, height - 8, x)
    drawing.text(14, height / 2, y, transform=f"rotate(-90 14 {height / 2:.0f})")
    return str(drawing)


def bars(rows: Sequence[Bar], *, title: str, x: str, mark: tuple[float, str] | None = None) -> str:
    """Horizontal bars, one below the other; parts have the colors of their order.

    Args:
        rows: The bars.
        title, x, mark: As for :func:`lines`.
    """
    step, left, end = 26, 250, 64
    height = _TOP + 14 + step * len(rows) + _BOTTOM
    drawing = _Drawing(height, title)
    right = max([sum(row.parts.values()) for row in rows] + [mark[0] if mark else 0]) or 1

    def at(value: float) -> float:
        return left + value / right * (_WIDTH - left - end)

    for tick in ticks(0, right):
        drawing.add(
            "line", x1=f"{at(tick):.1f}", x2=f"{at(tick):.1f}", y1=_TOP + 10, y2=height - _BOTTOM, class_="grid"
        )
        drawing.text(at(tick), height - _BOTTOM + 18, number(tick))
    for i, row in enumerate(rows):
        y, start = _TOP + 14 + i * step, 0.0
        drawing.text(left - 8, y + 14, row.label, "end")
        for j, (name, size) in enumerate(row.parts.items()):
            drawing.add(
                "rect",
                f"{row.label}, {name}: {size:.3g}",
                x=f"{at(start):.1f}",
                y=y,
                width=f"{max(at(start + size) - at(start), 0):.1f}",
                height=step - 8,
                class_=f"c{j}",
            )
            start += size
        drawing.text(at(start) + 5, y + 14, row.shown, "start")
    if mark is not None:
        drawing.add(
            "line", x1=f"{at(mark[0]):.1f}", x2=f"{at(mark[0]):.1f}", y1=_TOP + 6, y2=height - _BOTTOM, class_="mark"
        )
        drawing.text(at(mark[0]), _TOP + 2, mark[1])
    drawing.text((left + _WIDTH - end) / 2, height - 8, x)
    return str(drawing)


def dots(rows: Sequence[str], series: Sequence[Series], *, title: str, x: str) -> str:
    """A row per name with a mark per series, of its own shape and color.

    Args:
        rows: Names of the rows.
        series: ``x`` are the values, ``y`` the numbers of their rows, ``low`` and ``high`` error bars.
        title, x: As for :func:`lines`.
    """
    step, left = 30, 150
    height = _TOP + step * len(rows) + _BOTTOM
    drawing = _Drawing(height, title)
    values = [value for one in series for value in (*one.x, *one.low, *one.high)]
    low, high = min(values), max(values)
    low, high = max(0.0, low - 0.05 * (high - low or 1)), high + 0.05 * (high - low or 1)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT)

    for tick in ticks(low, high, 8):
        drawing.add("line", x1=f"{at(tick):.1f}", x2=f"{at(tick):.1f}", y1=_TOP, y2=height - _BOTTOM, class_="grid")
        drawing.text(at(tick), height - _BOTTOM + 18, number(tick))
    for i, name in enumerate(rows):
        drawing.text(left - 8, _TOP + step * (i + 0.5) + 4, name, "end")
        drawing.add("line", x1=0, x2=_WIDTH - _RIGHT, y1=_TOP + step * (i + 1), y2=_TOP + step * (i + 1), class_="grid")
    for i, one in enumerate(series):
        # Marks of equal value stand below one another.
        shift = 16 * (i / max(1, len(series) - 1) - 0.5)
        for j, (value, row) in enumerate(zip(one.x, one.y, strict=True)):
            y = _TOP + step * (row + 0.5) + shift
            if len(one.low):
                drawing.add(
                    "line",
                    x1=f"{at(one.low[j]):.1f}",
                    x2=f"{at(one.high[j]):.1f}",
                    y1=f"{y:.1f}",
                    y2=f"{y:.1f}",
                    class_=f"error c{i % 8}",
                )
            told = f"{one.label}, {rows[int(row)]}: {value:.4g}"
            drawing.marks.append(shape(i, at(value), y, told))
    drawing.text((left + _WIDTH) / 2, height - 8, x)
    return str(drawing)


def shape(index: int, x: float, y: float, told: str = "", size: float = 5.5) -> str:
    """The mark of a series: circle, square, triangle or diamond, in its color."""
    around: dict[int, list[tuple[float, float]]] = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.2), (1.2, 1), (-1.2, 1)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
    }
    title = f"<title>{escape(told)}</title>" if told else ""
    if index % _SHAPES == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="c{index % 8}">{title}</circle>'
    points = " ".join(f"{x + 0.9 * size * a:.1f},{y + 0.9 * size * b:.1f}" for a, b in around[index % _SHAPES])
    return f'<polygon points="{points}" class="c{index % 8}">{title}</polygon>'


def heat(columns: Sequence[str], rows: Sequence[str], shares: Sequence[Sequence[float]], *, title: str, x: str) -> str:
    """A heat map of shares, with the percentages in its cells.

    Args:
        columns, rows: Names.
        shares: A value from 0 to 1 per row and column.
        title: What the chart shows.
        x: Name of the columns.
    """
    width, step, left = min(90, (_WIDTH - 110) // max(1, len(columns))), 32, 90
    height = _TOP + step * len(rows) + _BOTTOM
    drawing = _Drawing(height, title)
    for i, (name, values) in enumerate(zip(rows, shares, strict=True)):
        drawing.text(left - 8, _TOP + step * (i + 0.5) + 4, name, "end")
        for j, value in enumerate(values):
            place: dict[str, object] = {
                "x": left + j * width,
                "y": _TOP + step * i,
                "width": width - 2,
                "height": step - 2,
            }
            drawing.add(
                "rect", f"{name} tokens, {columns[j]}: {value:.0%}", class_="heat", fill_opacity=f"{value:.2f}", **place
            )
            drawing.text(
                left + (j + 0.5) * width,
                _TOP + step * (i + 0.5) + 4,
                f"{100 * value:.0f}",
                class_="on" if value > 0.55 else "off",
            )
    for j, name in enumerate(columns):
        drawing.text(left + (j + 0.5) * width, height - _BOTTOM + 16, name)
    drawing.text(left + width * len(columns) / 2, height - 8, x)
    return str(drawing)


def legend(
    labels: Sequence[str], kinds: Sequence[int] | None = None, *, of_bars: bool = False
) -> Iterator[tuple[str, str]]:
    """Labels with the drawing that stands for each: a mark, a part of a bar, or with ``kinds`` a line."""
    for i, label in enumerate(labels):
        if of_bars:
            mark = f'<rect x="1" y="2" width="12" height="12" class="c{i}"></rect>'
        elif kinds is None:
            mark = shape(i, 8, 8)
        else:
            mark = f'<line x1="0" x2="28" y1="8" y2="8" class="line c{i % 8} d{kinds[i] % 3}"></line>'
        yield f'<svg viewBox="0 0 {16 if kinds is None else 28} 16" aria-hidden="true">{mark}</svg>', label
