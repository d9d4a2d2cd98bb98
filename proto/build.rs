//! Generates the gRPC code from the `.proto` files beside it, with protox in place of protoc, and keeps the descriptors
//! for server reflection.

use std::path::PathBuf;

use prost_types::FileDescriptorSet;
use protox::prost::Message as _;

const PROTOS: [&str; 3] =
    ["sirocco/expert/v1/expert.proto", "sirocco/inference/v1/inference.proto", "sirocco/cluster/v1/cluster.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=sirocco");
    let descriptors = protox::compile(PROTOS, ["."])?.encode_to_vec();
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(out, &descriptors)?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::Codec")
        .compile_fds(FileDescriptorSet::decode(descriptors.as_slice())?)?;
    Ok(())
}
