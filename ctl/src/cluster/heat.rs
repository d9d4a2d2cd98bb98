//! The heat map of `sirocco load`: a line for each layer, a cell for each expert.
//!
//! A cell's shade is its expert's share of the layer's tokens against an even share. Where experts are few, cells say the
//! percentage too; where they are more than a line has room for, several share a cell, which shows the hottest of them.

use crate::output::imbalance;
use crate::terminal::Paint;

/// One layer, a line of the map.
pub(super) struct Line<'a> {
    pub(super) layer: u32,
    /// Routed tokens a second of each expert.
    pub(super) tokens_per_s: &'a [f64],
    pub(super) imbalance: f64,
}

/// How a range of shares is drawn.
struct Shade {
    /// Times the even share, up to here.
    below: f64,
    plain: char,
    block: char,
    /// One of a terminal's 256.
    colour: u8,
    meaning: &'static str,
}

const SHADES: [Shade; 5] = [
    Shade { below: 0.05, plain: '.', block: '·', colour: 244, meaning: "next to none" },
    Shade { below: 0.5, plain: '-', block: '░', colour: 31, meaning: "under half" },
    Shade { below: 1.5, plain: '+', block: '▒', colour: 35, meaning: "about even" },
    Shade { below: 3.0, plain: '*', block: '▓', colour: 178, meaning: "up to 3 times" },
    Shade { below: f64::INFINITY, plain: '#', block: '█', colour: 196, meaning: "3 times and more" },
];

/// Room for a cell that says its percentage, with the space before it.
const LABELLED: usize = 7;

/// Where a line's last column, the layer's imbalance, has room.
const TAIL: usize = "  imbalance".len();

/// The map of `layers`, in lines of at most `width` characters, and what its shades mean.
pub(super) fn map(layers: &[Line], width: usize, paint: Paint) -> String {
    let experts = layers.iter().map(|layer| layer.tokens_per_s.len()).max().unwrap_or(0);
    let label = layers.iter().map(|layer| title(layer).len()).max().unwrap_or(0);
    let room = width.saturating_sub(label + 2 + TAIL).max(1);
    let labelled = experts * LABELLED <= room;
    let in_a_cell = if labelled { 1 } else { experts.div_ceil(room).max(1) };
    let cell = |ratio: f64| {
        let shade = shade(ratio);
        let glyph = match paint {
            Paint::Plain => shade.plain.to_string(),
            Paint::Blocks => format!("\x1b[38;5;{}m{}\x1b[0m", shade.colour, shade.block),
        };
        if labelled { format!("  {glyph} {:>2.0}%", 100.0 * ratio / experts as f64) } else { glyph }
    };
    let mut lines = vec![head(experts, label, if labelled { None } else { Some(in_a_cell) })];
    lines.extend(layers.iter().map(|layer| {
        let cells: Vec<String> = ratios(layer.tokens_per_s).chunks(in_a_cell).map(|some| cell(hottest(some))).collect();
        format!("{:<label$}  {}  {}", title(layer), cells.concat(), imbalance(layer.imbalance))
    }));
    lines.push(legend(paint));
    lines.join("\n")
}

fn title(layer: &Line) -> String {
    format!("layer {}", layer.layer)
}

/// The line above the cells; `in_a_cell` when cells are single characters.
fn head(experts: usize, label: usize, in_a_cell: Option<usize>) -> String {
    let Some(in_a_cell) = in_a_cell else {
        let titles: Vec<String> = (0..experts).map(|expert| format!("{expert:>LABELLED$}")).collect();
        return format!("{:<label$}  {}  imbalance", "expert", titles.concat());
    };
    let cells = experts.div_ceil(in_a_cell);
    let text = match in_a_cell {
        1 => format!("experts 0 to {}", experts - 1),
        _ => format!("experts 0 to {}, {in_a_cell} in a cell", experts - 1),
    };
    format!("{:<label$}  {text:<cells$}  imbalance", "")
}

fn legend(paint: Paint) -> String {
    let meanings = SHADES.iter().map(|shade| match paint {
        Paint::Plain => format!("{} {}", shade.plain, shade.meaning),
        Paint::Blocks => format!("\x1b[38;5;{}m{}\x1b[0m {}", shade.colour, shade.block, shade.meaning),
    });
    format!("against an even share: {}", meanings.collect::<Vec<_>>().join(", "))
}

/// Each expert's share of the tokens over an even share.
fn ratios(tokens_per_s: &[f64]) -> Vec<f64> {
    let all: f64 = tokens_per_s.iter().sum();
    let even = all / tokens_per_s.len() as f64;
    tokens_per_s.iter().map(|tokens| if even > 0.0 { tokens / even } else { 0.0 }).collect()
}

fn hottest(ratios: &[f64]) -> f64 {
    ratios.iter().copied().fold(0.0, f64::max)
}

fn shade(ratio: f64) -> &'static Shade {
    SHADES.iter().find(|shade| ratio < shade.below).unwrap_or(&SHADES[SHADES.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(tokens_per_s: &[f64], width: usize) -> Vec<String> {
        let layers = [Line { layer: 3, tokens_per_s, imbalance: 1.25 }];
        map(&layers, width, Paint::Plain).lines().map(str::to_owned).collect()
    }

    #[test]
    fn few_experts_are_shown_with_their_percentage() {
        let lines = plain(&[0.0, 10.0, 30.0, 160.0], 80);
        assert_eq!(lines[0], "expert         0      1      2      3  imbalance");
        assert_eq!(lines[1], "layer 3    .  0%  -  5%  + 15%  # 80%  1.25");
        assert!(lines[2].contains("# 3 times and more"), "{lines:?}");
    }

    #[test]
    fn more_experts_than_fit_share_cells_that_show_the_hottest_of_them() {
        let mut tokens = vec![1.0; 256];
        tokens[129] = 50.0;
        let lines = plain(&tokens, 80);
        assert_eq!(lines[0], format!("         {:<52}  imbalance", "experts 0 to 255, 5 in a cell"));
        assert_eq!(lines[1], format!("layer 3  {}#{}  1.25", "+".repeat(25), "+".repeat(26)));
        assert!(lines.iter().take(2).all(|line| line.len() <= 80), "{lines:?}");
    }

    #[test]
    fn idle_layers_and_narrow_terminals_are_drawn_all_the_same() {
        assert!(plain(&[0.0; 16], 40)[1].contains(&".".repeat(16)));
        assert!(plain(&[1.0; 16], 1)[1].contains('+'));
        assert_eq!(map(&[], 80, Paint::Plain).lines().count(), 2);
    }

    #[test]
    fn shades_are_coloured_on_terminals_only() {
        let layers = [Line { layer: 0, tokens_per_s: &[1.0, 0.0], imbalance: 0.0 }];
        assert!(map(&layers, 80, Paint::Blocks).contains("\x1b[38;5;178m▓\x1b[0m 100%"));
        assert!(!map(&layers, 80, Paint::Plain).contains('\x1b'));
    }
}
