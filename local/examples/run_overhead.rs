//! Measures what one run of `public_request` costs by itself: look-up, post, a reply that waits in
//! the mailbox already. `cargo run --profile dist -p local --example run_overhead`

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use local::{
    clock::Clock,
    connections::Identity,
    dynamodb::Table,
    latency::Latency,
    services::Services,
    sqs::{Attribute, NewMessage, QueueAttributes, ReceiveRequest},
    states::{States, definition::Definition},
};

const RUNS: u32 = 2000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let services = Arc::new(Services::new("http://127.0.0.1:1", Arc::default(), Latency::default()));
    services
        .dynamodb
        .create_table(Table {
            name: "connections",
            partition_key: "tunnel",
            sort_key: Some("connection_id"),
            expiry: Some("expires_at"),
        })
        .await?;
    for connection in ["#name", "abc="] {
        let item = serde_json::json!({ "TableName": "connections", "Item": {
            "tunnel": { "S": "web" }, "connection_id": { "S": connection }, "owner": { "S": "me" },
            "agent": { "S": "agent" }, "expires_at": { "N": "9999999999" } } });
        services.dynamodb.call("PutItem", item.to_string().into()).await;
    }
    let states = States::new(Arc::clone(&services), Clock::default());
    let substitutions = BTreeMap::from(
        [("ConnectionsTable", "connections"), ("AgentApiEndpoint", "local"), ("AgentApiStage", "local")]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    let source = include_str!("../../statemachines/public_request.asl.json");
    let machine = states.create("public_request", Definition::parse(source, &substitutions)?);
    let (_handle, mut outgoing) = services.connections.open("abc=".parse()?, Identity::default(), 8);
    let mailbox = services.sqs.create("mailbox", QueueAttributes::default())?;
    tokio::time::sleep(proto::limits::MAILBOX_WARM_UP).await;

    for bytes in [200, 32 * 1024, 120 * 1024] {
        let input = serde_json::json!({
            "request_id": "r", "tunnel": "web", "deadline_ms": 9_999_999_999_999_u64, "mailbox": mailbox,
            "pick": 0.3, "message": { "type": "request", "body": "x".repeat(bytes) },
        })
        .to_string();
        let attributes = BTreeMap::from([("request_id".into(), Attribute::text("r"))]);
        let reply = NewMessage { body: "x".repeat(bytes).into(), attributes, ..NewMessage::default() };
        let mut sum = std::time::Duration::ZERO;
        let mut best = std::time::Duration::MAX;
        for run in 0..RUNS {
            services.sqs.send(&mailbox, reply.clone())?;
            let accepted = states.accept(&machine, Some(&format!("run-{run}")), &input)?;
            let start = Instant::now();
            let result = states.run("example", accepted).await;
            let took = start.elapsed();
            sum += took;
            best = best.min(took);
            outgoing.try_recv()?;
            anyhow::ensure!(matches!(result.outcome, local::states::outcome::Outcome::Succeeded(_)));
            services.sqs.purge(&mailbox)?;
        }
        println!("{bytes:>7} bytes each way: mean {:?}, best {best:?}", sum / RUNS);
    }
    let trace = states.traces().into_iter().next().expect("the last run was traced");
    for span in &trace.states {
        let micros = span.exited_us.unwrap_or_default() - span.entered_us;
        println!("  {:<20} {micros:>5} us", &*span.state);
    }
    let start = Instant::now();
    let body = bytes::Bytes::from(
        r#"{"TableName":"connections","KeyConditionExpression":"tunnel = :t","ExpressionAttributeValues":{":t":{"S":"web"}}}"#,
    );
    for _ in 0..RUNS {
        services.dynamodb.call("Query", body.clone()).await;
    }
    println!("a query alone: {:?}", start.elapsed() / RUNS);
    for row in 0..200 {
        let item = serde_json::json!({ "TableName": "connections", "Item": {
            "tunnel": { "S": format!("t{row}") }, "connection_id": { "S": "abc=" }, "owner": { "S": "me" },
            "agent": { "S": "agent" }, "expires_at": { "N": "9999999999" } } });
        services.dynamodb.call("PutItem", item.to_string().into()).await;
    }
    let start = Instant::now();
    for _ in 0..RUNS {
        services.dynamodb.call("Query", body.clone()).await;
    }
    println!("a query beside 200 other rows: {:?}", start.elapsed() / RUNS);
    let start = Instant::now();
    for _ in 0..RUNS {
        services.sqs.send(&mailbox, NewMessage { body: "x".into(), ..NewMessage::default() })?;
        services.sqs.receive(&mailbox, ReceiveRequest::default()).await?;
    }
    println!("a send and a receive alone: {:?}", start.elapsed() / RUNS);
    Ok(())
}
