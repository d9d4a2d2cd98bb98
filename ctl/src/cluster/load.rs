//! `sirocco load`: how much each expert is asked for and how busy each node is.

use anyhow::{Result, bail};
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::heat::{self, Line};
use super::{Query, Show};
use crate::output::{self, Format, column, imbalance, rate, table};
use crate::terminal::{self, Paint};

/// Columns of the heat map where no terminal says otherwise.
const WIDTH: usize = 80;

/// Flags of `load`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this layer
    #[arg(long, env = "SIROCCO_LAYER", value_name = "N")]
    pub(super) layer: Option<u32>,
    #[command(flatten)]
    pub(super) show: Show,
}

/// A cluster's load, as shown to people and programs.
#[derive(Serialize)]
pub(super) struct LoadView {
    /// Measured by the leader now; otherwise as last stored.
    pub(super) live: bool,
    pub(super) imbalance: f64,
    pub(super) predicted_imbalance: f64,
    pub(super) layers: Vec<LayerView>,
    pub(super) nodes: Vec<NodeLoadView>,
}

/// One layer's load.
#[derive(Serialize)]
pub(super) struct LayerView {
    pub(super) layer: u32,
    /// Routed tokens a second of each expert, by index.
    pub(super) tokens_per_s: Vec<f64>,
    imbalance: f64,
}

/// One expert node's load.
#[derive(Serialize)]
pub(super) struct NodeLoadView {
    pub(super) id: String,
    pub(super) busy: f64,
    pub(super) queue: f64,
    pub(super) batch_rows: f64,
    pub(super) rows_per_s: f64,
    service_rows_per_s: f64,
}

/// The load of `layer`, or of all, and of the nodes, rendered.
pub(super) async fn view(query: &Query, layer: Option<u32>) -> Result<String> {
    let request = wire::GetLoadRequest {};
    let answer = query.coordinators.ask(async |mut client| Ok(client.get_load(request).await?.into_inner()));
    let load = LoadView::from(answer.await?);
    let load = match layer {
        Some(layer) => load.only(layer)?,
        None => load,
    };
    output::one(query.output, &load, || load.text(query.output))
}

impl LoadView {
    /// With this layer alone.
    fn only(mut self, layer: u32) -> Result<Self> {
        let known = self.layers.len();
        self.layers.retain(|view| view.layer == layer);
        if self.layers.is_empty() && known > 0 {
            bail!("layer: {layer}, the model has {known}");
        }
        Ok(self)
    }

    /// The heat map, then a line for each node.
    fn text(&self, format: Format) -> String {
        let layers: Vec<Line> = self
            .layers
            .iter()
            .map(|view| Line { layer: view.layer, tokens_per_s: &view.tokens_per_s, imbalance: view.imbalance })
            .collect();
        let map = match layers.as_slice() {
            [] => "no layer's load has been measured yet".to_owned(),
            layers => heat::map(layers, terminal::width().unwrap_or(WIDTH), Paint::here()),
        };
        format!("{}\n\n{map}\n\n{}", self.summary(), self.nodes(format)).trim_end().to_owned()
    }

    /// Whose measurement it is, and how even the load is.
    fn summary(&self) -> String {
        let source = if self.live { "measured now" } else { "as last stored, no coordinator measures it now" };
        format!("{source}; imbalance {}", self.balance())
    }

    /// How even the load is, and would be with even replicas.
    pub(super) fn balance(&self) -> String {
        if self.imbalance <= 0.0 && self.predicted_imbalance <= 0.0 {
            return "not known yet".to_owned();
        }
        format!("{} ({} predicted)", imbalance(self.imbalance), imbalance(self.predicted_imbalance))
    }

    fn nodes(&self, format: Format) -> String {
        let columns = ["node", "busy", "queue", "rows/s", "rows in a batch", "rows/s of work"].map(column);
        let rows: Vec<Vec<String>> = self
            .nodes
            .iter()
            .map(|node| {
                vec![
                    node.id.clone(),
                    percent(node.busy),
                    rate(node.queue),
                    rate(node.rows_per_s),
                    rate(node.batch_rows),
                    rate(node.service_rows_per_s),
                ]
            })
            .collect();
        if rows.is_empty() { String::new() } else { table(&columns, &rows, format == Format::Wide) }
    }
}

/// A share from 0 to 1 in percent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

impl From<wire::Load> for LoadView {
    fn from(load: wire::Load) -> Self {
        let layers = load.layers.into_iter().map(|layer| LayerView {
            layer: layer.layer,
            tokens_per_s: layer.tokens_per_s,
            imbalance: layer.imbalance,
        });
        let nodes = load.nodes.into_iter().map(|node| NodeLoadView {
            id: node.id,
            busy: node.busy,
            queue: node.queue,
            batch_rows: node.batch_rows,
            rows_per_s: node.rows_per_s,
            service_rows_per_s: node.service_rows_per_s,
        });
        Self {
            live: load.live,
            imbalance: load.imbalance,
            predicted_imbalance: load.predicted_imbalance,
            layers: layers.collect(),
            nodes: nodes.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_is_not_there_is_refused_once_layers_are_known() {
        let layers = |count| (0..count).map(|layer| wire::LayerLoad { layer, ..wire::LayerLoad::default() }).collect();
        let load = |count| LoadView::from(wire::Load { layers: layers(count), ..wire::Load::default() });
        assert_eq!(load(4).only(2).unwrap().layers.len(), 1);
        assert_eq!(load(4).only(9).err().unwrap().to_string(), "layer: 9, the model has 4");
        assert_eq!(load(0).only(9).unwrap().layers.len(), 0);
    }
}
