//! What quantised experts cost: the bundled model's bits per byte of text it was not trained on, by dtype.
//!
//! The text is from the World English Bible (public domain), paragraphs that the model's training left out. The figures are this
//! program's own; that of bf16 on all the held-out English text is 1.572 in the model's card.

use std::path::{Path, PathBuf};

use futures::executor::block_on;
use sirocco_model::{Checkpoint, quality};

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(relative)
}

#[test]
fn quantised_experts_cost_the_bits_per_byte_that_were_measured() {
    let checkpoint = Checkpoint::open(&path("demo")).unwrap();
    let text = std::fs::read_to_string(path("heldout.en.txt")).unwrap();
    let measured = block_on(quality(&checkpoint, &text, 2)).unwrap().map(|(_, bits_per_byte)| bits_per_byte);
    println!("{measured:.6?}");
    for (measured, golden) in measured.iter().zip([1.673_870, 1.674_335, 1.674_446]) {
        assert!((measured - golden).abs() < 1e-4, "{measured} is not {golden}");
    }
    let [bf16, int8, int4] = measured;
    assert!(int8 < bf16 * 1.002, "8 bits cost next to nothing");
    assert!(int4 < bf16 * 1.05, "4 bits cost a few per cent");
}
