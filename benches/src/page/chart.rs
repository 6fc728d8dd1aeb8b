//! Charts as SVG.

use std::fmt::Write;

use super::escape;

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 42.0;
const BOTTOM: f64 = 26.0;
const TOP: f64 = 8.0;
const RIGHT: f64 = 14.0;
/// Colours that most eyes can tell apart (Okabe and Ito 2008).
const COLOURS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"];
/// The axis is logarithmic from this ratio of the largest to the smallest value on.
const WIDE: f64 = 50.0;
/// Points of a line; more samples are thinned out.
const POINTS: usize = 400;

/// The samples of one side.
pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    pub(super) samples: &'a [f64],
}

/// Formats a value with a sensible number of digits.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100_000.0 => format!("{:.0}k", value / 1000.0),
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        v if v >= 0.001 => format!("{value:.3}"),
        _ => format!("{value:.0e}"),
    }
}

/// Maps values to places on the chart, and places the ticks.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn of(low: f64, high: f64) -> Self {
        let log = low > 0.0 && high / low >= WIDE;
        let (low, high) = match high > low {
            true => (low, high),
            // A single value is drawn in the middle.
            false => (low - 1.0, low + 1.0),
        };
        Self { low, high, log }
    }

    /// Returns the place of `value` on the axis, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + self.share(value).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = self.low.log10().ceil() as i32..=self.high.log10().floor() as i32;
            let all: Vec<f64> = decades.map(|d| 10f64.powi(d)).collect();
            let step = all.len().div_ceil(6).max(1);
            return all.into_iter().step_by(step).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let decade = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|m| m * decade)
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let first = (self.low / step).ceil();
        (0..8)
            .map(|i| (first + f64::from(i)) * step)
            .take_while(|tick| *tick <= self.high)
            .collect()
    }
}

fn open(height: f64, label: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-label=\"{}\" width=\"{WIDTH}\" \
         height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">",
        escape(label)
    )
}

/// Draws the cumulative distribution of each side's samples.
pub(super) fn cdf(sides: &[Series<'_>]) -> String {
    let all = || sides.iter().flat_map(|side| side.samples.iter().copied());
    let axis = Axis::of(
        all().fold(f64::INFINITY, f64::min),
        all().fold(f64::NEG_INFINITY, f64::max),
    );
    let y = |share: f64| TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(HEIGHT, "distribution");
    for quarter in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let at = y(quarter);
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{:.0} %</text>",
            WIDTH - RIGHT,
            LEFT - 5.0,
            at + 4.0,
            quarter * 100.0
        );
    }
    for tick in axis.ticks() {
        let at = axis.x(tick);
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#eee\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - BOTTOM,
            HEIGHT - 8.0,
            figure(tick)
        );
    }
    for (index, (side, colour)) in sides.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let mut sorted = side.samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len() as f64;
        let thin = sorted.len().div_ceil(POINTS).max(1);
        let mut points = String::new();
        for (rank, value) in sorted.iter().enumerate() {
            if rank % thin == 0 || rank + 1 == sorted.len() {
                let at = y((rank + 1) as f64 / count);
                let _ = write!(points, "{:.1},{at:.1} ", axis.x(*value));
            }
        }
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\" style=\"fill:{colour};font-weight:600\">{}</text>",
            points.trim_end(),
            WIDTH - RIGHT - 4.0,
            HEIGHT - BOTTOM - 8.0 - 15.0 * index as f64,
            escape(side.name)
        );
    }
    svg + "</svg>"
}

/// Draws points and the line that was fitted to them; both axes begin at zero.
pub(super) fn line(points: &[[f64; 2]], base: f64, slope: f64) -> String {
    let most = |of: usize| {
        let values = points.iter().filter_map(|point| point.get(of));
        values.copied().fold(0.0, f64::max)
    };
    let (far, high) = (most(0), most(1));
    let (across, up) = (Axis::of(0.0, far), Axis::of(0.0, high));
    let y = |value: f64| TOP + (1.0 - up.share(value).clamp(0.0, 1.0)) * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(HEIGHT, "growth");
    for tick in up.ticks() {
        let at = y(tick);
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 5.0,
            at + 4.0,
            figure(tick)
        );
    }
    for tick in across.ticks() {
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            across.x(tick),
            HEIGHT - 8.0,
            figure(tick)
        );
    }
    let _ = write!(
        svg,
        "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{}\" stroke-dasharray=\"4\"/>",
        across.x(0.0),
        across.x(far),
        y(base),
        y(base + slope * far),
        COLOURS[1]
    );
    for [at, value] in points {
        let _ = write!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{}\"/>",
            across.x(*at),
            y(*value),
            COLOURS[0]
        );
    }
    svg + "</svg>"
}

/// Draws values as bars from zero, each with its name and figure.
pub(super) fn bars(rows: &[(String, f64)]) -> String {
    const ROW: f64 = 34.0;
    let most = rows.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    let height = ROW * rows.len() as f64 + 4.0;
    let mut svg = open(height, "medians");
    for (index, (name, value)) in rows.iter().enumerate() {
        let top = ROW * index as f64;
        let share = if most > 0.0 { value / most } else { 0.0 };
        let length = share.clamp(0.0, 1.0) * (WIDTH - 70.0);
        let _ = write!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}</text>\
             <rect x=\"0\" y=\"{:.1}\" width=\"{length:.1}\" height=\"13\" fill=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            top + 12.0,
            escape(name),
            top + 16.0,
            COLOURS[0],
            length + 5.0,
            top + 27.0,
            figure(*value)
        );
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_the_middle_of_the_line() {
        let samples: Vec<f64> = (1..=101).map(f64::from).collect();
        let axis = Axis::of(1.0, 49.0);
        assert!(!axis.log);
        let svg = cdf(&[Series {
            name: "hearth",
            samples: &samples,
        }]);
        let points = svg.split("points=\"").nth(1).unwrap();
        let points: Vec<&str> = points.split('"').next().unwrap().split(' ').collect();
        assert_eq!(points.len(), samples.len());
        let (_, y) = points[50].split_once(',').unwrap();
        let middle = TOP + (HEIGHT - TOP - BOTTOM) / 2.0;
        assert!((y.parse::<f64>().unwrap() - middle).abs() < 2.0, "{y}");
    }

    #[test]
    fn ticks_are_round_few_and_inside() {
        for (low, high) in [(0.0, 1.0), (3.0, 97.0), (1.0, 1e6), (5.0, 5.0), (0.2, 0.21)] {
            let axis = Axis::of(low, high);
            let ticks = axis.ticks();
            assert!((1..=8).contains(&ticks.len()), "{low} {high}: {ticks:?}");
            for tick in ticks {
                assert!((-1e-9..=1.0 + 1e-9).contains(&axis.share(tick)), "{tick}");
            }
        }
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let svg = bars(&[("a".into(), 10.0), ("b".into(), 5.0)]);
        let widths: Vec<f64> = svg
            .split("<rect")
            .skip(1)
            .map(|rect| {
                let width = rect.split("width=\"").nth(1).unwrap();
                width.split('"').next().unwrap().parse().unwrap()
            })
            .collect();
        assert!((widths[0] - 2.0 * widths[1]).abs() < 0.2);
    }
}
