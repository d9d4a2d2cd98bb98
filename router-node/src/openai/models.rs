//! `GET /v1/models` and `GET /v1/models/{id}`: the one model that is served.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Api;
use super::problem::Problem;

/// Every model.
pub(super) async fn list(State(api): State<Api>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model(&api)]}))
}

/// One of them.
pub(super) async fn one(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    api.intake.check_model(&id)?;
    Ok(Json(model(&api)))
}

fn model(api: &Api) -> Value {
    let model = &api.intake.model;
    json!({
        "id": model.name,
        "object": "model",
        "created": api.created,
        "owned_by": "sirocco",
        "max_model_len": model.spec.max_position_embeddings,
        "experts": {
            "layers": model.spec.num_hidden_layers,
            "per_layer": model.spec.num_local_experts,
            "per_token": model.spec.num_experts_per_tok,
        },
    })
}
