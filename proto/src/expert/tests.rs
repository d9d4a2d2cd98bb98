use super::*;

fn request() -> DispatchRequest {
    DispatchRequest {
        id: 7,
        fingerprint: Fingerprint([9; 32]),
        layer: LayerId(2),
        deadline: Some(Duration::from_millis(250)),
        hidden_states: Rows::new(vec![1.0, 2.0, 3.0, 4.0], 2),
        experts: vec![ExpertRows { expert: ExpertId(3), rows: vec![1, 0] }],
    }
}

#[test]
fn a_request_survives_the_wire() {
    assert_eq!(DispatchRequest::from_wire(request().into_wire()), Ok(request()));
}

#[test]
fn a_malformed_request_is_refused_by_name() {
    type Change = fn(&mut wire::DispatchRequest);
    let cases: [(Change, RefusalReason, &str); 5] = [
        (|r| r.model_fingerprint = vec![1, 2].into(), RefusalReason::Invalid, "model_fingerprint"),
        (|r| r.hidden_states = None, RefusalReason::Invalid, "hidden_states"),
        (|r| r.experts[0].rows[0] = 2, RefusalReason::Invalid, "asks for row 2"),
        // Each of 2^26 + 1 rows is 8 bytes.
        (|r| r.experts[0].rows = vec![1; (1 << 26) + 1], RefusalReason::Invalid, "an answer of 536870920 bytes"),
        (|r| r.hidden_states.as_mut().unwrap().crc32c ^= 1, RefusalReason::Corrupt, "checksum"),
    ];
    for (change, reason, message) in cases {
        let mut wire = request().into_wire();
        change(&mut wire);
        let refusal = DispatchRequest::from_wire(wire).map(drop).unwrap_err();
        assert_eq!(refusal.reason, reason);
        assert!(refusal.message.contains(message), "{refusal}");
    }
}

#[test]
fn every_refusal_survives_the_wire() {
    use RefusalReason::*;
    for reason in [NotHeld, Invalid, WrongModel, Corrupt, Unavailable, DeadlineExceeded, Internal] {
        let refusal = Refusal::new(reason, "why");
        let outputs = ExpertOutputs {
            experts: vec![(ExpertId(1), Err(refusal.clone())), (ExpertId(2), Ok(()))],
            rows: Rows::new(vec![0.5; 4], 4),
        };
        for result in [Err(refusal), Ok(outputs)] {
            let response = DispatchResponse { id: 1, result };
            assert_eq!(DispatchResponse::from_wire(response.clone().into_wire()), response);
        }
    }
}
