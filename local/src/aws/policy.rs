//! What each function may call: enters a function and an action, leaves yes or no. It says the
//! same as the roles of the deployed functions.

use std::fmt;

/// A function that may call everything: `local` itself and tests.
pub const OPERATOR: &str = "operator";

/// A table of the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// Tunnels and their connections.
    Connections,
    /// Leases of mailboxes.
    Mailboxes,
    /// None of them.
    Other,
}

/// What is called, as far as a role tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// An action of SQS.
    Sqs(&'a str),
    /// An operation of DynamoDB on a table.
    DynamoDb(&'a str, Table),
    /// An action of Step Functions.
    States(&'a str),
    /// Anything under `@connections`.
    ManageConnections,
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqs(action) => write!(f, "sqs:{action}"),
            Self::DynamoDb(operation, Table::Connections) => {
                write!(f, "dynamodb:{operation} on resource: table of connections")
            }
            Self::DynamoDb(operation, Table::Mailboxes) => {
                write!(f, "dynamodb:{operation} on resource: table of mailboxes")
            }
            Self::DynamoDb(operation, Table::Other) => write!(f, "dynamodb:{operation}"),
            Self::States(action) => write!(f, "states:{action}"),
            Self::ManageConnections => write!(f, "execute-api:ManageConnections"),
        }
    }
}

/// The actions of SQS that run here. A batch needs the right to its single action, as in AWS.
pub(super) fn sqs_action(operation: &str) -> Option<&'static str> {
    const ACTIONS: &[&str] = &[
        "ChangeMessageVisibility",
        "CreateQueue",
        "DeleteMessage",
        "DeleteMessageBatch",
        "DeleteQueue",
        "GetQueueAttributes",
        "GetQueueUrl",
        "ListQueues",
        "PurgeQueue",
        "ReceiveMessage",
        "SendMessage",
        "SendMessageBatch",
    ];
    ACTIONS.iter().copied().find(|action| *action == operation)
}

/// Whether the function's role allows the action.
#[must_use]
pub fn allows(function: &str, action: Action<'_>) -> bool {
    match function {
        OPERATOR => true,
        "ingress" => match action {
            Action::States(action) => action == "StartSyncExecution",
            Action::Sqs(action) => {
                matches!(action, "ReceiveMessage" | "DeleteMessage" | "DeleteMessageBatch" | "CreateQueue")
            }
            Action::DynamoDb(operation, table) => {
                table == Table::Mailboxes && matches!(operation, "Query" | "UpdateItem" | "PutItem")
            }
            Action::ManageConnections => true,
        },
        "response" => matches!(action, Action::Sqs("SendMessage")),
        "connect" => matches!(
            action,
            Action::DynamoDb("GetItem" | "PutItem" | "UpdateItem" | "DeleteItem", Table::Connections)
        ),
        "disconnect" => matches!(
            action,
            Action::DynamoDb("GetItem" | "DeleteItem", Table::Connections)
                | Action::DynamoDb("Query", Table::Mailboxes)
                | Action::Sqs("SendMessage" | "SendMessageBatch")
        ),
        "sweep" => match action {
            Action::Sqs(action) => {
                matches!(action, "ListQueues" | "GetQueueAttributes" | "CreateQueue" | "DeleteQueue")
            }
            Action::DynamoDb("Query" | "PutItem" | "UpdateItem" | "DeleteItem", Table::Mailboxes)
            | Action::DynamoDb("Scan", Table::Connections) => true,
            Action::DynamoDb(..) | Action::States(_) | Action::ManageConnections => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_may_do_its_own_work_only() {
        assert!(allows("ingress", Action::States("StartSyncExecution")));
        assert!(allows("ingress", Action::DynamoDb("Query", Table::Mailboxes)));
        assert!(!allows("ingress", Action::DynamoDb("Query", Table::Connections)));
        assert!(!allows("ingress", Action::Sqs("SendMessage")));
        assert!(allows("response", Action::Sqs("SendMessage")));
        assert!(!allows("response", Action::ManageConnections));
        assert!(!allows("connect", Action::DynamoDb("Scan", Table::Connections)));
        assert!(allows("disconnect", Action::Sqs("SendMessageBatch")));
        for action in
            [Action::ManageConnections, Action::Sqs("SendMessage"), Action::States("StartSyncExecution")]
        {
            assert!(!allows("authorizer", action) && !allows("somebody", action) && allows(OPERATOR, action));
        }
    }

    #[test]
    fn a_refusal_names_the_action() {
        assert_eq!(
            Action::DynamoDb("Scan", Table::Connections).to_string(),
            "dynamodb:Scan on resource: table of connections"
        );
        assert_eq!(Action::Sqs("SendMessage").to_string(), "sqs:SendMessage");
    }
}
